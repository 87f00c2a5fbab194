// y = x W^T + b on the rows of x. Its tangent: t_y = t_x W^T + x t_W^T + t_b, and so for both gradients,
//   grad_x = grad_y W          t: t_grad_y W + grad_y t_W
//   grad_W = grad_y^T x        t: t_grad_y^T x + grad_y^T t_x
//
// In full precision a thread holds a tile of a product in registers and reads 16 bytes at a time. Large tiles
// read each number less often; small ones are more, and keep every warp busy where there are few rows and
// columns. With rounded operands a warp holds a tile, and tensor cores multiply (mma.cuh).
#pragma once
#include "linear_mma.cuh"

namespace fastmaml::cuda::FASTMAML_TEAM {

// as many large tiles as this are preferred to small ones
constexpr int enough_tiles = 96;

// Tile x Tile numbers of y. Its rows and columns are as far apart as there are tiles, so that the threads of
// a warp read rows of W that are neighbours.
template <bool Dual, int Tile, class T>
FASTMAML_DEVICE void linear_forward_tiles(const OpRow& op, const Pass<T>& p) {
  const ParamRow& q = p.table.param[op.w];
  const int rows = p.rows(op.in0), width = p.width(op.out), ldx = p.ld(op.in0), ldy = p.ld(op.out);
  const int tall = divide_up(rows, Tile), wide = divide_up(width, Tile);
  const Place<T> x = p.value(op.in0), w = p.param(op.w);
  const Place<T> t_x = Dual && op.tangent_in0 ? p.t_value(op.in0) : x;
  const ParamTangent<T> t_w = p.param_tangent(op.w);
  const bool moves = op.tangent_in0;
  for (int tile = thread(); tile < tall * wide; tile += threads()) {
    const int row = tile / wide, column = tile % wide;
    T sum[Tile][Tile] = {}, t_sum[Tile][Tile] = {};
    int at_x[Tile], at_w[Tile];
#pragma unroll
    for (int j = 0; j < Tile; ++j) {
      at_x[j] = least(row + j * tall, rows - 1) * ldx;
      at_w[j] = least(column + j * wide, q.O - 1);
    }
    for (int i = 0; i < q.I; i += lanes<T>) {
      Vec<T> a[Tile], t_a[Tile];
#pragma unroll
      for (int j = 0; j < Tile; ++j) {
        a[j] = load(x + at_x[j] + i);
        if (Dual) t_a[j] = moves ? load(t_x + at_x[j] + i) : zeros<T>();
      }
#pragma unroll
      for (int c = 0; c < Tile; ++c) {
        const Vec<T> b = load(w + at_w[c] * q.ld + i);
        Vec<T> t_b{};
        if (Dual) t_b = load_tangent(t_w, at_w[c] * q.ld + i, at_w[c] * q.I + i, q.I - i);
#pragma unroll
        for (int r = 0; r < Tile; ++r)
#pragma unroll
          for (int l = 0; l < lanes<T>; ++l) {
            sum[r][c] += a[r].at[l] * b.at[l];
            if (Dual) t_sum[r][c] += t_a[r].at[l] * b.at[l] + a[r].at[l] * t_b.at[l];
          }
      }
    }
#pragma unroll
    for (int c = 0; c < Tile; ++c) {
      const int o = column + c * wide;
      if (o >= width) continue;
      T bias = 0, t_bias = 0;
      if (op.b >= 0 && o < q.O) {
        bias = p.param(op.b)[o];
        if (Dual) t_bias = load_tangent(p.param_tangent(op.b), o, o);
      }
#pragma unroll
      for (int r = 0; r < Tile; ++r) {
        const int n = row + r * tall;
        if (n >= rows) continue;
        const T y = o < q.O ? sum[r][c] + bias : T(0), t_y = o < q.O ? t_sum[r][c] + t_bias : T(0);
        put_y<Dual>(op, p, n * ldy + o, y, t_y);
      }
    }
  }
}

template <bool Dual, class T>
FASTMAML_DEVICE void linear_forward(const OpRow& op, const Pass<T>& p) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (p.precision == tf32) return linear_forward_mma<Dual, tf32>(op, p);
    if (p.precision == bf16) return linear_forward_mma<Dual, bf16>(op, p);
  }
  if (divide_up(p.rows(op.in0), 4) * divide_up(p.width(op.out), 4) >= enough_tiles)
    linear_forward_tiles<Dual, 4>(op, p);
  else
    linear_forward_tiles<Dual, 2>(op, p);
}

// Rows x one vector of grad_x
template <bool Dual, int Rows, class T>
FASTMAML_DEVICE void linear_backward_tiles(const OpRow& op, const Pass<T>& p) {
  const ParamRow& q = p.table.param[op.w];
  const int rows = p.rows(op.in0), ldx = p.ld(op.in0), ldd = p.ld(op.out);
  const int tall = divide_up(rows, Rows), wide = p.width(op.in0) / lanes<T>;
  const Place<T> d = p.grad(op.out), t_d = Dual ? p.t_grad(op.out) : d, w = p.param(op.w);
  const ParamTangent<T> t_w = p.param_tangent(op.w);
  for (int tile = thread(); tile < tall * wide; tile += threads()) {
    const int row = tile / wide, i = tile % wide * lanes<T>;
    Vec<T> sum[Rows] = {}, t_sum[Rows] = {};
    int at_d[Rows];
#pragma unroll
    for (int r = 0; r < Rows; ++r) at_d[r] = least(row + r * tall, rows - 1) * ldd;
    for (int o = 0; o < q.O; o += lanes<T>) {
      Vec<T> a[Rows], t_a[Rows];
#pragma unroll
      for (int r = 0; r < Rows; ++r) {
        a[r] = load(d + at_d[r] + o);
        if (Dual) t_a[r] = load(t_d + at_d[r] + o);
      }
#pragma unroll
      for (int k = 0; k < lanes<T>; ++k) {
        const int from = least(o + k, q.O - 1);  // past the end d is zero
        const Vec<T> b = load(w + from * q.ld + i);
        Vec<T> t_b{};
        if (Dual) t_b = load_tangent(t_w, from * q.ld + i, from * q.I + i, q.I - i);
#pragma unroll
        for (int r = 0; r < Rows; ++r)
#pragma unroll
          for (int l = 0; l < lanes<T>; ++l) {
            sum[r].at[l] += a[r].at[k] * b.at[l];
            if (Dual) t_sum[r].at[l] += t_a[r].at[k] * b.at[l] + a[r].at[k] * t_b.at[l];
          }
      }
    }
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
      const int n = row + r * tall;
      if (n < rows) put_grad_x<Dual>(op, p, n * ldx + i, sum[r], t_sum[r]);
    }
  }
}

template <bool Dual, class T>
FASTMAML_DEVICE void linear_backward(const OpRow& op, const Pass<T>& p) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (p.precision == tf32) return linear_backward_mma<Dual, tf32>(op, p);
    if (p.precision == bf16) return linear_backward_mma<Dual, bf16>(op, p);
  }
  if (divide_up(p.rows(op.in0), 4) * (p.width(op.in0) / lanes<T>) >= enough_tiles)
    linear_backward_tiles<Dual, 4>(op, p);
  else
    linear_backward_tiles<Dual, 1>(op, p);
}

// One vector of outputs x one of inputs; Plain: is g itself wanted, Dual: its tangent?
template <bool Plain, bool Dual, class T>
FASTMAML_DEVICE void linear_weight_tiles(const OpRow& op, const Pass<T>& p) {
  const ParamRow& q = p.table.param[op.w];
  const ParamGrad<T> to = p.param_grad(op.w, op.first_w);
  const int rows = p.rows(op.in0), ldx = p.ld(op.in0), ldd = p.ld(op.out);
  const int tall = divide_up(q.O, lanes<T>), wide = divide_up(q.I, lanes<T>);
  const Place<T> x = p.value(op.in0), d = p.grad(op.out);
  const Place<T> t_x = Dual && op.tangent_in0 ? p.t_value(op.in0) : x;
  const Place<T> t_d = Dual ? p.t_grad(op.out) : d;
  const bool moves = op.tangent_in0;
  T product = 0;
  for (int tile = thread(); tile < tall * wide; tile += threads()) {
    const int o = tile / wide * lanes<T>, i = tile % wide * lanes<T>;
    Vec<T> g[lanes<T>] = {}, t_g[lanes<T>] = {};
    for (int n = 0; n < rows; ++n) {
      const Vec<T> a = load(d + n * ldd + o), b = load(x + n * ldx + i);
      Vec<T> t_a{}, t_b{};
      if (Dual) t_a = load(t_d + n * ldd + o);
      if (Dual && moves) t_b = load(t_x + n * ldx + i);
#pragma unroll
      for (int r = 0; r < lanes<T>; ++r)
#pragma unroll
        for (int l = 0; l < lanes<T>; ++l) {
          if (Plain) g[r].at[l] += a.at[r] * b.at[l];
          if (Dual) t_g[r].at[l] += t_a.at[r] * b.at[l] + a.at[r] * t_b.at[l];
        }
    }
#pragma unroll
    for (int r = 0; r < lanes<T>; ++r)
      if (o + r < q.O)
        product += finish<Dual>(to, (o + r) * q.ld + i, (o + r) * q.I + i, q.I - i, g[r], t_g[r]);
  }
  finish_products(p, op.w, product);
}

template <bool Plain, bool Dual, class T>
FASTMAML_DEVICE void linear_weight_grads(const OpRow& op, const Pass<T>& p) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (p.precision == tf32) return linear_weight_mma<Plain, Dual, tf32>(op, p);
    if (p.precision == bf16) return linear_weight_mma<Plain, Dual, bf16>(op, p);
  }
  linear_weight_tiles<Plain, Dual>(op, p);
}

template <bool Dual, class T>
FASTMAML_DEVICE void linear_param_grads(const OpRow& op, const Pass<T>& p) {
  if (p.wants_param_grad(op.w)) {
    if (!Dual)
      linear_weight_grads<true, false>(op, p);
    else if (p.multiplies || p.grad_primal != 0)
      linear_weight_grads<true, true>(op, p);
    else
      linear_weight_grads<false, true>(op, p);
  }
  if (p.wants_param_grad(op.b)) {
    const ColumnTerm<T> d{p.grad(op.out), {}}, t_d{Dual ? p.t_grad(op.out) : d.a, {}};
    column_sums<Dual, 0>(p, op.b, op.first_b, op.out, d, t_d, t_d);
  }
}

}  // namespace fastmaml::cuda::FASTMAML_TEAM
