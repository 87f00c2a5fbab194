// The shape that all activations share: y = f(x), t_y = f'(x) t_x, grad_x = f'(x) grad_y, and its tangent
//   t_grad_x = f'(x) t_grad_y + f''(x) t_x grad_y
#pragma once
#include "pass.cuh"

namespace fastmaml::cuda::FASTMAML_TEAM {

// to what is there, unless it is the first
template <class T>
FASTMAML_DEVICE void put(Place<T> to, T v, int first) {
  *to = first ? v : *to + v;
}
template <class T, int n>
FASTMAML_DEVICE void put(Place<T> to, Vec<T, n> v, int first) {
  if (!first) {
    const Vec<T, n> before = load<n>(to);
#pragma unroll
    for (int l = 0; l < n; ++l) v.at[l] += before.at[l];
  }
  store(to, v);
}

// An activation F has value(x) and slopes(a, first, second): f'(x), and f''(x) or, if F::of_output, f''(x) /
// f'(x). `a` is x, or y if F::of_output: then neither x nor its tangent has to be kept, since f'' t_x = f'' /
// f' t_y.
template <bool Dual, class F, class T>
FASTMAML_DEVICE void elementwise_forward(const OpRow& op, const Pass<T>& p, const F& f) {
  const int C = p.columns(op.in0), ld = p.ld(op.in0);
  each(p.rows(op.in0), p.width(op.in0), [&](int row, int c) {
    const int at = row * ld + c;
    const T x = p.value(op.in0)[at], y = c < C ? f.value(x) : T(0);  // f(0) may not be 0
    p.value(op.out)[at] = y;
    if constexpr (Dual) {
      T first, second;
      f.slopes(F::of_output ? y : x, first, second);
      p.t_value(op.out)[at] = first * p.t_value(op.in0)[at];
    }
  });
}

template <bool Dual, class F, class T>
FASTMAML_DEVICE void elementwise_backward(const OpRow& op, const Pass<T>& p, const F& f) {
  const int ld = p.ld(op.in0), from = F::of_output ? op.out : op.in0;
  each(p.rows(op.in0), p.width(op.in0), [&](int row, int c) {
    const int at = row * ld + c;
    const T d = p.grad(op.out)[at];
    T first, second;
    f.slopes(p.value(from)[at], first, second);
    put(p.grad(op.in0) + at, first * d, op.first_in0);
    if constexpr (Dual) {
      T v = first * p.t_grad(op.out)[at];
      if (op.tangent_in0) v += second * p.t_value(from)[at] * d;
      put(p.t_grad(op.in0) + at, v, op.first_in0);
    }
  });
}

}  // namespace fastmaml::cuda::FASTMAML_TEAM
