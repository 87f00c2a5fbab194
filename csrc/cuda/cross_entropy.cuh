// L = sum_n s_n (log sum_c e^z_c - sum_c q_c z_c), q = (1 - smoothing) onehot(y) + smoothing / C, s_n = w_n /
// sum w (1 / N without).
//   grad_z = s_n (p - q), p = softmax z     t: s_n p (t_z - <p, t_z>)
// Szegedy et al. 2016 (label smoothing, arXiv 1512.00567).
#pragma once
#include "pass.cuh"

namespace fastmaml::cuda::FASTMAML_TEAM {

// Writes the gradient and its tangent; returns this thread's part of the loss. A warp takes an example.
template <bool Dual, class T>
FASTMAML_DEVICE T cross_entropy(const Pass<T>& p, const int64_t* target, Place<T> share) {
  const int b = p.table.output, ld = p.ld(b), C = p.columns(b), width = p.width(b);
  const T smoothing = T(p.table.label_smoothing), off = smoothing / C, on = 1 - smoothing;
  T loss = 0;
  for (int n = warp(); n < p.rows(b); n += warps()) {
    const Place<T> z = p.value(b) + n * ld, t_z = Dual ? p.t_value(b) + n * ld : z;
    const int64_t label = target[n];
    // a label out of range shows as NaN: to raise, the host would have to wait for it
    const T s = label >= 0 && label < C ? share[n] : log(T(-1));
    const Place<T> d = p.grad(b) + n * ld, t_d = Dual ? p.t_grad(b) + n * ld : d;
    T top = z[0], norm = 0, along = 0, expected = 0;
    for (int c = lane(); c < C; c += 32) top = z[c] > top ? z[c] : top;
    top = warp_max(top);
    for (int c = lane(); c < C; c += 32) {
      const T e = exp(z[c] - top);
      norm += e;
      if (Dual) along += e * t_z[c];
      expected += (off + (c == label ? on : T(0))) * (z[c] - top);
    }
    norm = warp_sum(norm);
    if (Dual) along = warp_sum(along) / norm;
    for (int c = lane(); c < width; c += 32) {
      const T prob = c < C ? exp(z[c] - top) / norm : T(0);
      d[c] = c < C ? s * (prob - off - (c == label ? on : T(0))) : T(0);
      if (Dual) t_d[c] = c < C ? s * prob * (t_z[c] - along) : T(0);
    }
    loss -= s * expected;
    if (lane() == 0) loss += s * log(norm);
  }
  return loss;
}

}  // namespace fastmaml::cuda::FASTMAML_TEAM
