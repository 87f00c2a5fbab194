// L = sum_n s_n (log sum_c e^z_c - sum_c q_c z_c), q = (1 - smoothing) onehot(y) + smoothing / C, s_n = w_n /
// sum w (1 / N without).
//   grad_z = s_n (p - q), p = softmax z     t: s_n p (t_z - <p, t_z>)
// Szegedy et al. 2016 (label smoothing, arXiv 1512.00567).
#pragma once
#include "pass.h"

namespace fastmaml::FASTMAML_ISA {

template <bool Dual, class T>
double cross_entropy(const Pass<T>& p, const int64_t* target, const T* weight) {
  const int64_t out = p.plan.program.output, ld = p.ld(out), C = p.plan.program.buffers[out].C;
  const double smoothing = p.plan.program.label_smoothing;
  double total = p.n, loss = 0;
  if (weight) {
    total = 0;
    for (int64_t i = 0; i < p.n; ++i) total += weight[i];
  }
  for (int64_t i = 0; i < p.n; ++i) {
    const T* z = p.value(out) + i * ld;
    const T s = T((weight ? weight[i] : T(1)) / total);
    T* d = (Dual ? p.t_grad(out) : p.grad(out)) + i * ld;  // holds e^(z - max) first
    T top = z[0];
    for (int64_t c = 1; c < C; ++c) top = z[c] > top ? z[c] : top;
    T norm = 0;
    for (int64_t c = 0; c < C; ++c) norm += d[c] = std::exp(z[c] - top);
    if constexpr (Dual) {
      const T* t = p.t_value(out) + i * ld;
      T along = 0;
      for (int64_t c = 0; c < C; ++c) along += d[c] * t[c];
      along /= norm;
      for (int64_t c = 0; c < C; ++c) d[c] = s * (d[c] / norm) * (t[c] - along);
    } else {
      double expected = (1 - smoothing) * (z[target[i]] - top);
      for (int64_t c = 0; c < C; ++c) {
        if (smoothing) expected += smoothing / C * (z[c] - top);
        d[c] = s * (d[c] / norm - T(smoothing / C) - (c == target[i] ? T(1 - smoothing) : T(0)));
      }
      loss += s * (std::log(norm) - expected);
    }
  }
  return loss;
}

}  // namespace fastmaml::FASTMAML_ISA
