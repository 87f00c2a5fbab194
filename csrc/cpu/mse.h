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
  for (int64_t row = 0; row < p.n * b.R; ++row) {
    const double s = (weight ? weight[row / b.R] : T(1)) / (total * b.R * b.C);
    for (int64_t c = 0; c < b.C; ++c) {
      if constexpr (Dual) {
        p.t_grad(out)[row * ld + c] = T(2 * s) * p.t_value(out)[row * ld + c];
      } else {
        const T e = p.value(out)[row * ld + c] - target[row * b.C + c];
        p.grad(out)[row * ld + c] = T(2 * s) * e;
        loss += s * double(e) * double(e);
      }
    }
  }
  return loss;
}

}  // namespace fastmaml::FASTMAML_ISA
