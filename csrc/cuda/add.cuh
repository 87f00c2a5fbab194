// y = a + b; both gradients are grad_y. Linear, so its tangents are the same sums.
#pragma once
#include "elementwise.cuh"

namespace fastmaml::cuda::FASTMAML_TEAM {

template <class T>
FASTMAML_DEVICE void put_sum(Place<T> to, Vec<T> a, const Vec<T>& b) {
#pragma unroll
  for (int l = 0; l < lanes<T>; ++l) a.at[l] += b.at[l];
  store(to, a);
}

template <bool Dual, class T>
FASTMAML_DEVICE void add_forward(const OpRow& op, const Pass<T>& p) {
  each(p.rows(op.out) * p.ld(op.out) / lanes<T>, [&](int i) {
    const int at = i * lanes<T>;
    const Vec<T> none{};  // a buffer that does not move has no tangent
    put_sum(p.value(op.out) + at, load(p.value(op.in0) + at), load(p.value(op.in1) + at));
    if constexpr (Dual)
      put_sum(p.t_value(op.out) + at, op.tangent_in0 ? load(p.t_value(op.in0) + at) : none,
              op.tangent_in1 ? load(p.t_value(op.in1) + at) : none);
  });
}

template <class T>
FASTMAML_DEVICE void pass_on(int size, Place<T> from, Place<T> to, int first) {
  each(size / lanes<T>, [&](int i) { put(to + i * lanes<T>, load(from + i * lanes<T>), first); });
}

template <bool Dual, class T>
FASTMAML_DEVICE void add_backward(const OpRow& op, const Pass<T>& p) {
  const int size = p.rows(op.out) * p.ld(op.out);
  if (p.wants_grad(op.tangent_in0)) {
    pass_on(size, p.grad(op.out), p.grad(op.in0), op.first_in0);
    if (Dual) pass_on(size, p.t_grad(op.out), p.t_grad(op.in0), op.first_in0);
  }
  if (p.wants_grad(op.tangent_in1)) {
    pass_on(size, p.grad(op.out), p.grad(op.in1), op.first_in1);
    if (Dual) pass_on(size, p.t_grad(op.out), p.t_grad(op.in1), op.first_in1);
  }
}

}  // namespace fastmaml::cuda::FASTMAML_TEAM
