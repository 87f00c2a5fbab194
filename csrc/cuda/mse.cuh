// L = sum_n s_n |z_n - y_n|^2 / C, with s_n = w_n / sum w (1 / N without weights) and C numbers in an
// example's output.
//   grad_z = 2 s_n (z - y) / C     t: 2 s_n t_z / C
#pragma once
#include "pass.cuh"

namespace fastmaml::cuda::FASTMAML_TEAM {

// Writes the gradient and its tangent; returns this thread's part of the loss.
template <bool Dual, class T>
FASTMAML_DEVICE T mse(const Pass<T>& p, const T* target, Place<T> share) {
  const int b = p.table.output, ld = p.ld(b), C = p.columns(b), R = p.table.buffer[b].R;
  T loss = 0;
  each(p.rows(b), p.width(b), [&](int row, int c) {
    const int at = row * ld + c;
    const T s = share[row / R] / (R * C), e = c < C ? p.value(b)[at] - target[row * C + c] : T(0);
    loss += s * e * e;
    p.grad(b)[at] = 2 * s * e;
    if (Dual) p.t_grad(b)[at] = c < C ? 2 * s * p.t_value(b)[at] : T(0);
  });
  return loss;
}

}  // namespace fastmaml::cuda::FASTMAML_TEAM
