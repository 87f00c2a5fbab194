// y = x W^T + b on the rows of x. Its tangent: t_y = t_x W^T + x t_W^T + t_b, and so for both gradients,
//   grad_x = grad_y W          t: t_grad_y W + grad_y t_W
//   grad_W = grad_y^T x        t: t_grad_y^T x + grad_y^T t_x
#pragma once
#include "pass.h"

namespace fastmaml::FASTMAML_ISA {

// A [rows, K] times the matrix in `s`, transposed or not, whichever the layout makes an nn or an nt product.
template <class T, int NP>
void times(const Slot& s, bool transpose, int64_t rows, const T* const (&a)[NP], int64_t lda,
           const T* const (&w)[NP], T* y, int64_t ldy, const Activate<T>& e) {
  const bool by_rows = s.wide == transpose;
  Factors<T> f[NP];
  for (int p = 0; p < NP; ++p) f[p] = {a[p], lda, 1, w[p], s.ld, by_rows ? s.rows : s.cols};
  if (by_rows)
    nn<T, NP>(rows, s.cols, f, y, ldy, e);
  else
    nt<T, NP>(rows, s.rows, f, y, ldy, e);
}

template <bool Dual, class T>
void linear_forward(const OpPlan& o, const Pass<T>& p) {
  const Op& op = o.op;
  const Slot& s = p.plan.slots[op.w];
  const int64_t rows = p.rows(op.in0), lda = p.ld(op.in0), ldy = p.ld(op.out);
  Activate<T> e;
  if constexpr (!Dual) {
    e.bias = p.param(op.b);
    e.act = op.act, e.slope = op.slope;
    times<T, 1>(s, true, rows, {p.value(op.in0)}, lda, {p.param(op.w)}, p.out(op.out), ldy, e);
  } else {
    e.bias = p.t_param(op.b);
    if (op.act) e.mask = p.value(op.out), e.ld_mask = ldy, e.mask_slope = op.slope;
    if (o.tangent_in0)
      times<T, 2>(s, true, rows, {p.t_value(op.in0), p.value(op.in0)}, lda, {p.param(op.w), p.t_param(op.w)},
                  p.t_value(op.out), ldy, e);
    else
      times<T, 1>(s, true, rows, {p.value(op.in0)}, lda, {p.t_param(op.w)}, p.t_value(op.out), ldy, e);
  }
}

template <class T, int NP>
void linear_weight_grad(const Slot& s, int64_t rows, const T* const (&x)[NP], int64_t ldx,
                        const T* const (&d)[NP], int64_t ldd, const ParamGrad<T>& g) {
  Factors<T> f[NP];
  for (int p = 0; p < NP; ++p)
    f[p] = s.wide ? Factors<T>{x[p], 1, ldx, d[p], ldd, rows} : Factors<T>{d[p], 1, ldd, x[p], ldx, rows};
  nn<T, NP>(s.rows, s.cols, f, g.dst, s.ld, g.update());
}

// A part of the rows of a parameter or of its gradient.
template <class T>
const T* rows_from(const T* w, const Slot& s, int64_t row) {
  return w ? w + row * s.ld : nullptr;
}

template <bool Dual, class T>
void bias_grad(const OpPlan& o, const Pass<T>& p) {
  const T* const d = Dual ? p.t_grad(o.op.out) : p.grad(o.op.out);
  column_sum<T, 1>(p.rows(o.op.out), p.width(o.op.out), p.ld(o.op.out), {{d, nullptr}},
                   p.param_grad(o.op.b, o.first_b));
}

template <bool Dual, class T>
void linear_backward(const OpPlan& o, const Pass<T>& p) {
  const Op& op = o.op;
  const Slot& s = p.plan.slots[op.w];
  const int64_t rows = p.rows(op.in0), ldx = p.ld(op.in0), ldd = p.ld(op.out);
  const T* d = p.grad(op.out);
  const T* t_d = Dual ? p.t_grad(op.out) : nullptr;
  const bool grad_x = p.wants_grad(o.tangent_in0), grad_w = p.wants_param_grad(op.w);
  const int64_t block = grad_x && grad_w ? s.block : s.rows;
  for (int64_t row = 0; row < s.rows; row += block) {
    Slot part = s;
    part.rows = std::min(block, s.rows - row);
    const int64_t column = s.wide ? row : 0;  // of x
    const T* w = rows_from(p.param(op.w), s, row);
    const T* t_w = Dual ? rows_from(p.t_param(op.w), s, row) : nullptr;
    const T* x = p.value(op.in0) + column;
    const T* t_x = Dual && o.tangent_in0 ? p.t_value(op.in0) + column : nullptr;
    if (grad_x) {
      Activate<T> e;
      T* dx = (Dual ? p.t_grad(op.in0) : p.grad(op.in0)) + column;
      e.add = !o.first_in0;
      if (op.mask) e.mask = x, e.ld_mask = ldx, e.mask_slope = op.mask_slope;
      if constexpr (Dual)
        times<T, 2>(part, false, rows, {t_d, d}, ldd, {w, t_w}, dx, ldx, e);
      else
        times<T, 1>(part, false, rows, {d}, ldd, {w}, dx, ldx, e);
    }
    if (grad_w) {
      ParamGrad<T> g = p.param_grad(op.w, o.first_w);
      g.dst += row * s.ld, g.base = rows_from(g.base, s, row), g.scale_each = rows_from(g.scale_each, s, row);
      if (t_x)
        linear_weight_grad<T, 2>(part, rows, {x, t_x}, ldx, {t_d, d}, ldd, g);
      else
        linear_weight_grad<T, 1>(part, rows, {x}, ldx, {Dual ? t_d : d}, ldd, g);
    }
  }
  if (p.wants_param_grad(op.b)) bias_grad<Dual>(o, p);
}

// sum_i a_i b_i in double, over whole vectors: the rest of the last one is 0
template <class T>
double wide_dot(const T* a, const T* b, int64_t columns) {
  double sums[lanes<T>] = {};
  for (int64_t i = 0; i < columns; i += lanes<T>)
    for (int64_t j = 0; j < lanes<T>; ++j) sums[j] += double(a[i + j]) * double(b[i + j]);
  double total = 0;
  for (double sum : sums) total += sum;
  return total;
}

// |d^T x|^2 = <d d^T, x x^T>, whose terms may cancel: in double
template <class T>
double squared_norm(int64_t n, const T* d, int64_t ldd, int64_t O, const T* x, int64_t ldx, int64_t I) {
  double total = 0;
  for (int64_t r = 0; r < n; ++r)
    for (int64_t i = 0; i <= r; ++i)
      total +=
          (i < r ? 2 : 1) * wide_dot(d + r * ldd, d + i * ldd, O) * wide_dot(x + r * ldx, x + i * ldx, I);
  return total;
}

}  // namespace fastmaml::FASTMAML_ISA
