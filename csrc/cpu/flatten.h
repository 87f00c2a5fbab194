// The rows of an example one after another in a single row: a copy, since rows are padded.
#pragma once
#include "pass.h"

namespace fastmaml::FASTMAML_ISA {

// from rows of C numbers `ld_from` apart, R to an example, to rows of R C numbers `ld_to` apart, or back
template <bool Back, class T>
void flatten_copy(const Buffer& b, int64_t n, int64_t ld_rows, int64_t ld_flat, const T* from, T* to,
                  bool add) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t r = 0; r < b.R; ++r) {
      const int64_t at_rows = (i * b.R + r) * ld_rows, at_flat = i * ld_flat + r * b.C;
      const T* f = from + (Back ? at_flat : at_rows);
      T* t = to + (Back ? at_rows : at_flat);
      for (int64_t c = 0; c < b.C; ++c) t[c] = add ? t[c] + f[c] : f[c];
    }
}

template <bool Dual, class T>
void flatten_forward(const OpPlan& o, const Pass<T>& p) {
  const Op& op = o.op;
  const T* x = Dual ? p.t_value(op.in0) : p.value(op.in0);
  T* y = Dual ? p.t_value(op.out) : p.out(op.out);
  flatten_copy<false>(p.plan.program.buffers[op.in0], p.n, p.ld(op.in0), p.ld(op.out), x, y, false);
}

template <bool Dual, class T>
void flatten_backward(const OpPlan& o, const Pass<T>& p) {
  const Op& op = o.op;
  if (!p.wants_grad(o.tangent_in0)) return;
  const T* d = Dual ? p.t_grad(op.out) : p.grad(op.out);
  T* dx = Dual ? p.t_grad(op.in0) : p.grad(op.in0);
  flatten_copy<true>(p.plan.program.buffers[op.in0], p.n, p.ld(op.in0), p.ld(op.out), d, dx, !o.first_in0);
}

}  // namespace fastmaml::FASTMAML_ISA
