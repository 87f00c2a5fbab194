// A sweep over a program: every op in turn, the loss, and every op back. Plain, or dual: values and tangents
// together.
#pragma once
#include "add.cuh"
#include "batch_norm.cuh"
#include "cross_entropy.cuh"
#include "flatten.cuh"
#include "gelu.cuh"
#include "layer_norm.cuh"
#include "linear.cuh"
#include "mse.cuh"
#include "silu.cuh"
#include "tanh.cuh"

namespace fastmaml::cuda::FASTMAML_TEAM {

// f(activation) of the op's kind
template <class T, class F>
FASTMAML_DEVICE void with_activation(const OpRow& op, const F& f) {
  switch (op.kind) {
    case leaky_relu:
      return f(LeakyRelu<T>{T(op.attr)});
    case tanh_:
      return f(Tanh{});
    case sigmoid:
      return f(Sigmoid{});
    case gelu:
      return op.attr != 0 ? f(GeluTanh{}) : f(Gelu{});
    case silu:
      return f(Silu{});
  }
}

template <bool Dual, class T>
FASTMAML_DEVICE void forward_op(int number, const OpRow& op, const Pass<T>& p) {
  switch (op.kind) {
    case batch_norm:
      return batch_norm_forward<Dual>(number, op, p);
    case layer_norm:
      return layer_norm_forward<Dual>(number, op, p);
    case add:
      return add_forward<Dual>(op, p);
    case flatten:
      return flatten_forward<Dual>(op, p);
    default:
      with_activation<T>(op, [&](const auto& f) { elementwise_forward<Dual>(op, p, f); });
  }
}

// An op that no parameter precedes has no tangent, and no gradient unless that of x is wanted.
template <bool Dual, class T>
FASTMAML_DEVICE void forward(const Pass<T>& p) {
  for (int i = 0; i < p.table.ops; ++i) {
    const OpRow& op = p.table.op[i];
    if (op.kind == linear)
      linear_forward<Dual>(op, p);
    else if (Dual && op.tangent_out)
      forward_op<true>(i, op, p);
    else
      forward_op<false>(i, op, p);
    sync_team();
  }
}

template <bool Dual, class T>
FASTMAML_DEVICE void backward_op(int number, const OpRow& op, const Pass<T>& p) {
  switch (op.kind) {
    case linear:
      return linear_backward<Dual>(op, p);
    case batch_norm:
      return batch_norm_backward<Dual>(number, op, p);
    case layer_norm:
      return layer_norm_backward<Dual>(number, op, p);
    case flatten:
      return flatten_backward<Dual>(op, p);
    default:
      with_activation<T>(op, [&](const auto& f) { elementwise_backward<Dual>(op, p, f); });
  }
}

// The gradients of the buffers, a barrier, and those of the parameters, which may write over what the former
// read. The next op's may begin before they end: plan.h lets what they read last until then.
template <bool Dual, class T>
FASTMAML_DEVICE void backward(const Pass<T>& p) {
  for (int i = p.table.ops; i-- > 0;) {
    const OpRow& op = p.table.op[i];
    if (!op.tangent_out && !p.x_grad) continue;
    if (op.kind == add)
      add_backward<Dual>(op, p);
    else if (p.wants_grad(op.tangent_in0))
      backward_op<Dual>(i, op, p);
    sync_team();
    if (op.kind == linear) linear_param_grads<Dual>(op, p);
    if (op.kind == batch_norm || op.kind == layer_norm) norm_param_grads<Dual>(i, op, p);
  }
  sync_team();
}

// Writes the gradient of the output; returns this thread's part of the loss. No barrier follows.
template <bool Dual, class T>
FASTMAML_DEVICE T loss(const Pass<T>& p, const Set& set, int64_t task) {
  const BufferRow& out = p.table.buffer[p.table.output];
  const Place<T> share = shared<T>() + p.table.share;
  if (p.table.loss == mse_loss)
    return mse<Dual>(p, static_cast<const T*>(set.target) + task * set.n * out.R * out.C, share);
  return cross_entropy<Dual>(p, static_cast<const int64_t*>(set.target) + task * set.n, share);
}

}  // namespace fastmaml::cuda::FASTMAML_TEAM
