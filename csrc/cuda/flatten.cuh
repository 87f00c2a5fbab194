// The rows of an example one after another in a single row: a copy, since rows are padded.
#pragma once
#include "elementwise.cuh"

namespace fastmaml::cuda::FASTMAML_TEAM {

template <class T>
FASTMAML_DEVICE void flatten_rows(const OpRow& op, const Pass<T>& p, Place<T> x, Place<T> y) {
  const int C = p.columns(op.in0), ldx = p.ld(op.in0), ldy = p.ld(op.out), R = p.table.buffer[op.in0].R;
  each(p.rows(op.out), p.width(op.out),
       [&](int n, int c) { y[n * ldy + c] = c < R * C ? x[(n * R + c / C) * ldx + c % C] : T(0); });
}
template <class T>
FASTMAML_DEVICE void unflatten_rows(const OpRow& op, const Pass<T>& p, Place<T> d, Place<T> to) {
  const int C = p.columns(op.in0), ldx = p.ld(op.in0), ldy = p.ld(op.out), R = p.table.buffer[op.in0].R;
  each(p.rows(op.in0), p.width(op.in0), [&](int row, int c) {
    put(to + row * ldx + c, c < C ? d[row / R * ldy + row % R * C + c] : T(0), op.first_in0);
  });
}

template <bool Dual, class T>
FASTMAML_DEVICE void flatten_forward(const OpRow& op, const Pass<T>& p) {
  flatten_rows(op, p, p.value(op.in0), p.value(op.out));
  if (Dual) flatten_rows(op, p, p.t_value(op.in0), p.t_value(op.out));
}

template <bool Dual, class T>
FASTMAML_DEVICE void flatten_backward(const OpRow& op, const Pass<T>& p) {
  unflatten_rows(op, p, p.grad(op.out), p.grad(op.in0));
  if (Dual) unflatten_rows(op, p, p.t_grad(op.out), p.t_grad(op.in0));
}

}  // namespace fastmaml::cuda::FASTMAML_TEAM
