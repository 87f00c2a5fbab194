// A Program as the kernels see it: numbered buffers, parameters, a flat list of ops and a loss. No torch
// types.
#pragma once
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

namespace fastmaml {

// The numbers are those of `fastmaml/backends/cpu.py`, which encodes.
enum class Kind : int64_t {
  linear = 0,
  batch_norm = 1,
  layer_norm = 2,
  leaky_relu = 3,  // relu is slope 0
  tanh = 4,
  sigmoid = 5,
  gelu = 6,  // attr 1: the tanh approximation
  silu = 7,
  add = 8,
  flatten = 9,
};

enum class Loss : int64_t { none = 0, mse = 1, cross_entropy = 2 };

struct Buffer {
  int64_t R, C;  // rows and columns of one example: the last axis is C
};

struct Param {
  int64_t O, I;  // [O, I] for a matrix, [O, 1] for a vector
  bool matrix;
  bool adapt;      // false: frozen, the inner loop leaves it
  int64_t offset;  // in the flat parameter vector of the Python side
};

struct Op {
  Kind kind;
  int64_t in0, in1, out;  // buffers; in1 is -1 for all but add
  int64_t w, b;           // parameters, -1 where absent
  // A (leaky) relu between this op and its neighbour is folded into the two: `act` applies it to the output,
  // `mask` multiplies the gradient that leaves through in0 by its slope.
  bool act, mask;
  double attr;   // eps, the slope of leaky_relu, or 1 for gelu's tanh
  double slope;  // of the folded relu on the output
  double mask_slope;
};

struct Program {
  std::vector<Buffer> buffers;  // buffer 0 is x
  std::vector<Param> params;
  std::vector<Op> ops;  // each buffer is written once, in order
  int64_t output = 0;
  int64_t P = 0;  // length of the flat parameter vector
  Loss loss = Loss::none;
  double label_smoothing = 0;
  int64_t number = 0;  // of its own, where it was decoded: what is made of it can be found again
};

// text: whole numbers with spaces between them, real ones as their bits:
//   buffers params ops output P loss label_smoothing, then for each  R C | O I matrix adapt offset |
//   kind in0 in1 out w b act mask attr slope mask_slope
inline Program decode(const std::string& text) {
  const char* at = text.c_str();
  auto next = [&]() -> int64_t {
    char* end;
    const long long value = std::strtoll(at, &end, 10);
    if (end == at) throw std::invalid_argument("fastmaml: the encoded program is cut short");
    at = end;
    return value;
  };
  auto real = [&]() -> double {
    const int64_t bits = next();
    double value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  };
  static std::atomic<int64_t> decoded{0};
  Program p;
  p.number = ++decoded;
  p.buffers.resize(next());
  p.params.resize(next());
  p.ops.resize(next());
  p.output = next();
  p.P = next();
  p.loss = Loss(next());
  p.label_smoothing = real();
  for (Buffer& b : p.buffers) b.R = next(), b.C = next();
  for (Param& q : p.params)
    q.O = next(), q.I = next(), q.matrix = next(), q.adapt = next(), q.offset = next();
  for (Op& o : p.ops) {
    o.kind = Kind(next());
    o.in0 = next(), o.in1 = next(), o.out = next(), o.w = next(), o.b = next(), o.act = next();
    o.mask = next(), o.attr = real(), o.slope = real(), o.mask_slope = real();
  }
  return p;
}

}  // namespace fastmaml
