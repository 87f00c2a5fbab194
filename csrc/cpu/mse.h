// L = sum_n s_n |z_n - y_n|^2 / C, with s_n = w_n / sum w (1 / N without weights) and C numbers in an
// example's output.
//   grad_z = 2 s_n (z - y) / C     t: 2 s_n t_z / C
#pragma once
#include "pass.h"

namespace fastmaml::FASTMAML_ISA {

template <bool Dual, class T>
double mse(const Pass<T>& p, const T* target, const T* weight) {
  const int64_t out = p.plan.program.output, ld = p.ld(out);
  const Buffer& b = p.plan.program.buffers[out];
  double total = p.n, loss = 0;
  if (weight) {
    total = 0;
    for (int64_t i = 0; i < p.n; ++i) total += weight[i];
  }
  total *= b.R * b.C;
  const double each = 1 / total;
  const T* const z = Dual ? p.t_value(out) : p.value(out);
  T* const d = Dual ? p.t_grad(out) : p.grad(out);
  for (int64_t row = 0; row < p.n * b.R; ++row) {
    const double s = weight ? weight[row / b.R] / total : each;
    const T two_s = T(2 * s);
    for (int64_t c = 0; c < b.C; ++c) {
      const T e = Dual ? z[row * ld + c] : z[row * ld + c] - target[row * b.C + c];
      d[row * ld + c] = two_s * e;
      if constexpr (!Dual) loss += s * double(e) * double(e);
    }
  }
  return loss;
}

}  // namespace fastmaml::FASTMAML_ISA
