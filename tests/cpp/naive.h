// What the engine is compared with: every op by its formula, a number at a time, in double.
#pragma once
#include <algorithm>
#include <cmath>

#include "program.h"

namespace naive {

using namespace fastmaml;
using Vector = std::vector<double>;

inline double leaky_relu(double x, double slope) { return x > 0 ? x : slope * x; }

inline double activation(const Op& op, double x) {
  const double sigmoid = 1 / (1 + std::exp(-x));
  switch (op.kind) {
    case Kind::leaky_relu:
      return leaky_relu(x, op.attr);
    case Kind::tanh:
      return std::tanh(x);
    case Kind::sigmoid:
      return sigmoid;
    case Kind::silu:
      return x * sigmoid;
    default:
      return op.attr ? x / 2 * (1 + std::tanh(std::sqrt(2 / std::acos(-1)) * (x + 0.044715 * x * x * x)))
                     : x / 2 * std::erfc(-x / std::sqrt(2));
  }
}

// What one task's n examples x [n, R, C] give, with its parameters flat [P].
inline Vector output(const Program& p, const Vector& params, const Vector& x, int64_t n) {
  std::vector<Vector> values(p.buffers.size());
  values[0] = x;
  for (const Op& op : p.ops) {
    const Vector& a = values[op.in0];
    const int64_t I = p.buffers[op.in0].C, O = p.buffers[op.out].C, rows = n * p.buffers[op.in0].R;
    auto w = [&](int64_t i) { return op.w < 0 ? 1 : params[p.params[op.w].offset + i]; };
    auto b = [&](int64_t i) { return op.b < 0 ? 0 : params[p.params[op.b].offset + i]; };
    Vector y(n * p.buffers[op.out].R * O);
    if (op.kind == Kind::linear) {
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t o = 0; o < O; ++o) {
          y[r * O + o] = b(o);
          for (int64_t i = 0; i < I; ++i) y[r * O + o] += a[r * I + i] * w(o * I + i);
        }
    } else if (op.kind == Kind::layer_norm || op.kind == Kind::batch_norm) {
      const bool by_row = op.kind == Kind::layer_norm;
      const int64_t size = by_row ? I : rows;
      for (int64_t group = 0; group < (by_row ? rows : I); ++group) {
        auto at = [&](int64_t i) { return by_row ? group * I + i : i * I + group; };
        double mean = 0, variance = 0;
        for (int64_t i = 0; i < size; ++i) mean += a[at(i)] / size;
        for (int64_t i = 0; i < size; ++i) variance += std::pow(a[at(i)] - mean, 2) / size;
        for (int64_t i = 0; i < size; ++i) {
          const int64_t c = by_row ? i : group;
          y[at(i)] = w(c) * (a[at(i)] - mean) / std::sqrt(variance + op.attr) + b(c);
        }
      }
    } else if (op.kind == Kind::add) {
      for (std::size_t i = 0; i < y.size(); ++i) y[i] = a[i] + values[op.in1][i];
    } else if (op.kind == Kind::flatten) {
      y = a;
    } else {
      for (std::size_t i = 0; i < y.size(); ++i) y[i] = activation(op, a[i]);
    }
    if (op.act)
      for (double& v : y) v = leaky_relu(v, op.slope);
    values[op.out] = y;
  }
  return values[p.output];
}

// z [n, size], target [n, size], or a class for each example [n]; weight [n] or empty
inline double loss(const Program& p, const Vector& z, const Vector& target, const Vector& weight, int64_t n) {
  const int64_t size = z.size() / n;
  double sum = 0, total = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double* z_i = &z[i * size];
    double l = 0;
    if (p.loss == Loss::mse) {
      for (int64_t c = 0; c < size; ++c) l += std::pow(z_i[c] - target[i * size + c], 2) / size;
    } else {
      double norm = 0;
      for (int64_t c = 0; c < size; ++c) norm += std::exp(z_i[c]);
      for (int64_t c = 0; c < size; ++c) {
        const double wanted = (c == target[i] ? 1 - p.label_smoothing : 0) + p.label_smoothing / size;
        l -= wanted * (z_i[c] - std::log(norm));
      }
    }
    const double w = weight.empty() ? 1 : weight[i];
    sum += w * l, total += w;
  }
  return sum / total;
}

}  // namespace naive
