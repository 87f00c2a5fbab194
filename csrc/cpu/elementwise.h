// The shape that all activations share: y = f(x), t_y = f'(x) t_x, grad_x = f'(x) grad_y, and its tangent
//   t_grad_x = f'(x) t_grad_y + f''(x) t_x grad_y
#pragma once
#include "pass.h"

namespace fastmaml::FASTMAML_ISA {

// An activation F has value(x), slopes(x, y, first, second) and the constant at_zero: is f(0) something else
// than 0?
template <bool Dual, class F, class T>
void elementwise_forward(const OpPlan& o, const Pass<T>& p, const F& f) {
  constexpr int64_t W = lanes<T>;
  const Op& op = o.op;
  const int64_t size = p.rows(op.in0) * p.ld(op.in0);
  const T* x = p.value(op.in0);
  for (int64_t i = 0; i < size; i += W) {
    if constexpr (!Dual) {
      store(p.out(op.out) + i, f.value(load(x + i)));
    } else {
      Vec<T> first, second;
      f.slopes(load(x + i), load(p.value(op.out) + i), first, second);
      store(p.t_value(op.out) + i, first * load(p.t_value(op.in0) + i));
    }
  }
  if (!Dual && F::at_zero) {  // the padding must stay 0
    const int64_t ld = p.ld(op.in0), C = p.plan.program.buffers[op.in0].C;
    for (int64_t r = 0; r < p.rows(op.in0); ++r)
      for (int64_t c = C; c < ld; ++c) p.out(op.out)[r * ld + c] = 0;
  }
}

template <bool Dual, class F, class T>
void elementwise_backward(const OpPlan& o, const Pass<T>& p, const F& f) {
  constexpr int64_t W = lanes<T>;
  const Op& op = o.op;
  if (!p.wants_grad(o.tangent_in0)) return;
  const int64_t size = p.rows(op.in0) * p.ld(op.in0);
  T* dx = Dual ? p.t_grad(op.in0) : p.grad(op.in0);
  const T* d = Dual ? p.t_grad(op.out) : p.grad(op.out);
  for (int64_t i = 0; i < size; i += W) {
    Vec<T> first, second;
    f.slopes(load(p.value(op.in0) + i), load(p.value(op.out) + i), first, second);
    Vec<T> v = first * load(d + i);
    if (Dual && o.tangent_in0) v += second * load(p.t_value(op.in0) + i) * load(p.grad(op.out) + i);
    store(dx + i, o.first_in0 ? v : load(dx + i) + v);
  }
}

}  // namespace fastmaml::FASTMAML_ISA
