// The end of a linear layer's passes: the (leaky) relu that is folded into it.
#pragma once
#include "elementwise.cuh"
#include "leaky_relu.cuh"

namespace fastmaml::cuda::FASTMAML_TEAM {

// y of one output of one example before its (leaky) relu, and its tangent
template <bool Dual, class T>
FASTMAML_DEVICE void put_y(const OpRow& op, const Pass<T>& p, int at, T y, T t_y) {
  if (Dual) {
    if (op.act) t_y = leaky_relu_grad(t_y, y, T(op.slope));
    p.t_value(op.out)[at] = t_y;
  }
  if (op.act) y = leaky_relu_of(y, T(op.slope));
  p.value(op.out)[at] = y;
}
// n numbers of grad_x before those of a relu that is folded into this op, and their tangents
template <bool Dual, class T, int n>
FASTMAML_DEVICE void put_grad_x(const OpRow& op, const Pass<T>& p, int at, Vec<T, n> g, Vec<T, n> t_g) {
  if (op.mask) {
    const Vec<T, n> y = load<n>(p.value(op.in0) + at);
#pragma unroll
    for (int l = 0; l < n; ++l) {
      g.at[l] = leaky_relu_grad(g.at[l], y.at[l], T(op.mask_slope));
      if (Dual) t_g.at[l] = leaky_relu_grad(t_g.at[l], y.at[l], T(op.mask_slope));
    }
  }
  put(p.grad(op.in0) + at, g, op.first_in0);
  if (Dual) put(p.t_grad(op.in0) + at, t_g, op.first_in0);
}

}  // namespace fastmaml::cuda::FASTMAML_TEAM
