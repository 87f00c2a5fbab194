// y = a + b; both gradients are grad_y. Linear, so its tangents are the same sums.
#pragma once
#include "pass.h"

namespace fastmaml::FASTMAML_ISA {

template <bool Dual, class T>
void add_forward(const OpPlan& o, const Pass<T>& p) {
  const Op& op = o.op;
  const int64_t size = p.rows(op.out) * p.ld(op.out);
  // a buffer that does not move has no tangent
  const T* a = !Dual ? p.value(op.in0) : o.tangent_in0 ? p.t_value(op.in0) : nullptr;
  const T* b = !Dual ? p.value(op.in1) : o.tangent_in1 ? p.t_value(op.in1) : nullptr;
  T* y = Dual ? p.t_value(op.out) : p.out(op.out);
  for (int64_t i = 0; i < size; i += lanes<T>)
    store(y + i, (a ? load(a + i) : Vec<T>{}) + (b ? load(b + i) : Vec<T>{}));
}

template <bool Dual, class T>
void add_backward(const OpPlan& o, const Pass<T>& p) {
  const Op& op = o.op;
  const int64_t size = p.rows(op.out) * p.ld(op.out);
  const T* d = Dual ? p.t_grad(op.out) : p.grad(op.out);
  auto pass_on = [&](int64_t in, bool first) {
    T* dx = Dual ? p.t_grad(in) : p.grad(in);
    for (int64_t i = 0; i < size; i += lanes<T>)
      store(dx + i, first ? load(d + i) : load(dx + i) + load(d + i));
  };
  if (p.wants_grad(o.tangent_in0)) pass_on(op.in0, o.first_in0);
  if (p.wants_grad(o.tangent_in1)) pass_on(op.in1, o.first_in1);
}

}  // namespace fastmaml::FASTMAML_ISA
