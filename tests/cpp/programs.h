// Small programs of odd sizes that between them take every path through the kernels.
#pragma once
#include "program.h"

namespace programs {

using namespace fastmaml;

// Each op returns the buffer that it writes.
struct Net : Program {
  Net(int64_t R, int64_t C) { buffers = {{R, C}}; }

  int64_t param(int64_t O, int64_t I = 1, bool matrix = false) {
    params.push_back({O, I, matrix, true, P});
    P += (O * I + 15) / 16 * 16;
    return static_cast<int64_t>(params.size()) - 1;
  }

  int64_t op(Kind kind, int64_t in, Buffer out, int64_t w = -1, int64_t b = -1, double attr = 0,
             int64_t in1 = -1) {
    output = static_cast<int64_t>(buffers.size());
    buffers.push_back(out);
    ops.push_back({kind, in, in1, output, w, b, false, false, attr, 0, 0});
    return output;
  }

  int64_t tied_linear(int64_t in, int64_t w, int64_t b) {
    const int64_t out = op(Kind::linear, in, {buffers[in].R, params[w].O}, w, b);
    for (const Op& before : ops)
      if (before.out == in && before.act) ops.back().mask = true, ops.back().mask_slope = before.slope;
    return out;
  }
  int64_t linear(int64_t in, int64_t O, bool bias = true) {
    const int64_t w = param(O, buffers[in].C, true);
    return tied_linear(in, w, bias ? param(O) : -1);
  }
  int64_t norm(Kind kind, int64_t in, double eps, bool affine) {
    const int64_t w = affine ? param(buffers[in].C) : -1;
    return op(kind, in, buffers[in], w, affine ? param(buffers[in].C) : -1, eps);
  }
  int64_t activation(Kind kind, int64_t in, double attr = 0) {
    return op(kind, in, buffers[in], -1, -1, attr);
  }
  int64_t add(int64_t a, int64_t b) { return op(Kind::add, a, buffers[a], -1, -1, 0, b); }
  int64_t flatten(int64_t in) { return op(Kind::flatten, in, {1, buffers[in].R * buffers[in].C}); }

  // a (leaky) relu within the last op and the linear that follows it
  void fold(double slope) { ops.back().act = true, ops.back().slope = slope; }
};

// Matrices of both layouts (plan.h), a relu that is folded.
inline Program mlp(int64_t O) {
  Net p(1, 3);
  int64_t h = p.linear(0, 9);
  p.fold(0.1);
  h = p.activation(Kind::tanh, p.linear(h, 7, false));
  p.linear(h, O);
  return p;
}

// Rows a line further apart than their length: a multiple of 512 bytes.
inline Program wide() {
  Net p(1, 2);
  const int64_t h = p.linear(0, 64);
  p.fold(0);
  p.linear(h, 3);
  return p;
}

// Buffers too: a multiple of a kilobyte. An op without parameters goes over all of their rows.
inline Program wider() {
  Net p(1, 2);
  p.linear(p.activation(Kind::tanh, p.linear(0, 128)), 3);
  return p;
}

inline Program norms(int64_t O) {
  Net p(1, 4);
  int64_t h = p.norm(Kind::batch_norm, p.linear(0, 5, false), 0.1, true);
  p.fold(0.2);
  h = p.norm(Kind::layer_norm, p.linear(h, 6), 0.2, true);
  p.fold(0);
  h = p.norm(Kind::batch_norm, p.linear(h, 3), 0.3, false);
  h = p.norm(Kind::layer_norm, p.linear(h, 5), 0.4, false);
  p.linear(p.activation(Kind::silu, h), O);
  return p;
}

// Without eps a column of the padding, which has no variance, gives 1 / 0; the matrix that follows reads it.
inline Program no_eps() {
  Net p(1, 3);
  const int64_t h = p.norm(Kind::batch_norm, p.linear(0, 7), 0, true);
  p.linear(h, 1);
  return p;
}

// Ops whose input does not move with the parameters, and all in a row.
inline Program chain() {
  Net p(3, 3);
  int64_t h = p.activation(Kind::gelu, p.norm(Kind::layer_norm, 0, 0.1, true), 0);
  h = p.add(p.activation(Kind::gelu, 0, 1), p.linear(h, 3));
  h = p.flatten(p.activation(Kind::sigmoid, h));
  h = p.activation(Kind::leaky_relu, p.norm(Kind::batch_norm, h, 0.2, true), 0.3);
  p.linear(h, 3);
  return p;
}

// An activation that is not 0 at 0 in front of a matrix whose rows are padded, and one of large curvature.
inline Program gates() {
  Net p(1, 4);
  int64_t h = p.activation(Kind::sigmoid, p.linear(0, 7));
  h = p.activation(Kind::gelu, p.linear(h, 3), 1);
  p.linear(h, 2);
  return p;
}

// Wide enough for sums of four lanes of float.
inline Program columns() {
  Net p(1, 5);
  int64_t h = p.activation(Kind::tanh, p.linear(0, 11));
  h = p.activation(Kind::tanh, p.linear(h, 6));
  p.linear(h, 9);
  return p;
}

// Rows longer than a panel of theta in L1.
inline Program long_rows() {
  Net p(1, 1030);
  int64_t h = p.linear(p.activation(Kind::tanh, p.linear(0, 3)), 1030);
  h = p.linear(p.activation(Kind::tanh, h), 3);
  p.fold(0.1);
  p.linear(h, 2);
  return p;
}

// Rows enough to pay for a matrix to be transposed, which has more of them than a piece.
inline Program many_rows() {
  Net p(6, 4);
  const int64_t h = p.linear(0, 6);
  p.fold(0.1);
  p.linear(p.activation(Kind::tanh, p.linear(h, 70)), 5);
  return p;
}

// Buffers with several readers: the gradients that each op leaves are added.
inline Program fan() {
  Net p(2, 3);
  const int64_t a = p.linear(p.flatten(0), 5), b = p.linear(a, 5), c = p.linear(a, 5, false);
  int64_t s = p.add(p.add(a, b), p.add(c, p.norm(Kind::layer_norm, a, 0.1, true)));
  s = p.add(s, p.norm(Kind::batch_norm, a, 0.2, false));
  s = p.add(p.add(s, p.activation(Kind::tanh, a)), p.activation(Kind::silu, s));
  const int64_t rows = p.linear(0, 4);
  s = p.activation(Kind::sigmoid, s);
  s = p.linear(p.add(s, s), 8);
  s = p.add(p.add(s, p.flatten(rows)), p.flatten(p.activation(Kind::gelu, rows)));
  const int64_t out = p.linear(s, 3);
  p.add(out, p.linear(p.activation(Kind::tanh, s), 3));
  return p;
}

// Weights used twice, frozen ones if asked, and one that nothing uses.
inline Program tied(bool frozen) {
  Net p(1, 4);
  const int64_t w = p.param(4, 4, true), b = p.param(4), unused = p.param(3);
  int64_t h = p.activation(Kind::tanh, p.tied_linear(0, w, b));
  h = p.norm(Kind::layer_norm, h, 0.1, true);
  const Op norm = p.ops.back();
  h = p.activation(Kind::sigmoid, p.tied_linear(h, w, b));
  h = p.op(Kind::layer_norm, h, p.buffers[h], norm.w, norm.b, 0.2);
  h = p.activation(Kind::tanh, p.linear(h, 5));
  p.params[p.ops[p.ops.size() - 2].w].adapt = !frozen;
  p.params[unused].adapt = true;
  p.linear(h, 3);
  return p;
}

inline Program tiny() {
  Net p(1, 2);
  p.activation(Kind::tanh, p.linear(0, 3));
  return p;
}

inline Program no_parameters() {
  Net p(1, 3);
  p.activation(Kind::tanh, 0);
  return p;
}

}  // namespace programs
