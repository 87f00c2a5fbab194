// A sweep over a program: every op in turn, and the loss.
#pragma once
#include "add.h"
#include "batch_norm.h"
#include "cross_entropy.h"
#include "flatten.h"
#include "gelu.h"
#include "layer_norm.h"
#include "leaky_relu.h"
#include "linear.h"
#include "mse.h"
#include "request.h"
#include "sigmoid.h"
#include "silu.h"
#include "tanh.h"

namespace fastmaml::FASTMAML_ISA {

// f(forward or backward of the op's kind): the one list of ops
template <bool Dual, bool Forward, class T>
void run_op(const OpPlan& o, const Pass<T>& p) {
  auto elementwise = [&](const auto& f) {
    Forward ? elementwise_forward<Dual>(o, p, f) : elementwise_backward<Dual>(o, p, f);
  };
  switch (o.op.kind) {
    case Kind::linear:
      return Forward ? linear_forward<Dual>(o, p) : linear_backward<Dual>(o, p);
    case Kind::batch_norm:
      return Forward ? batch_norm_forward<Dual>(o, p) : batch_norm_backward<Dual>(o, p);
    case Kind::layer_norm:
      return Forward ? layer_norm_forward<Dual>(o, p) : layer_norm_backward<Dual>(o, p);
    case Kind::leaky_relu:
      return elementwise(LeakyRelu<T>{T(o.op.attr)});
    case Kind::tanh:
      return elementwise(Tanh<T>{});
    case Kind::sigmoid:
      return elementwise(Sigmoid<T>{});
    case Kind::gelu:
      return o.op.attr ? elementwise(GeluTanh<T>{}) : elementwise(Gelu<T>{});
    case Kind::silu:
      return elementwise(Silu<T>{});
    case Kind::add:
      return Forward ? add_forward<Dual>(o, p) : add_backward<Dual>(o, p);
    case Kind::flatten:
      return Forward ? flatten_forward<Dual>(o, p) : flatten_backward<Dual>(o, p);
  }
}

template <bool Dual, class T>
double loss(const Pass<T>& p, const Set& set, int64_t t) {
  const Buffer& b = p.plan.program.buffers[p.plan.program.output];
  const T* weight = set.weight ? static_cast<const T*>(set.weight) + t * set.n : nullptr;
  if (p.plan.program.loss == Loss::mse)
    return mse<Dual>(p, static_cast<const T*>(set.target) + t * set.n * b.R * b.C, weight);
  return cross_entropy<Dual>(p, static_cast<const int64_t*>(set.target) + t * set.n, weight);
}

}  // namespace fastmaml::FASTMAML_ISA
