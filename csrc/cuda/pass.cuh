// One sweep over a program for one task: what an op finds and where it writes.
#pragma once
#include "team.cuh"

namespace fastmaml::cuda::FASTMAML_TEAM {

// Where the gradient g of a parameter goes, element by element, and with it in a dual sweep its tangent t_g:
//   dst = base + scale rates g                   (plain)      the fast weights, W - a g
//   dst = base + scale t_g + primal g            (dual)       the adjoint, v - H u
//   <v, g> into `product`, or v g into `each_product`         the gradient of the step sizes
template <class T>
struct ParamGrad {
  int dst, base;  // in shared memory; base is -1 for none
  bool writes;
  T scale, primal;
  const T* rates;  // flat, one for each element, or null
  bool multiplies;
  int v;
  T* each_product;  // flat, or null
};

// The tangent of a parameter: factor rates v, element by element.
template <class T>
struct ParamTangent {
  int at;
  T factor;
  const T* rates;
};

template <class T>
struct Pass {
  const Table& table;
  const Layout& layout;
  // gradients of the parameters: see ParamGrad
  int grad_dst = -1, grad_base = -1;
  T grad_scale = 1, grad_primal = 0;
  bool descends = false;  // is the scale times minus the step size?
  bool multiplies = false;
  T* products = nullptr;  // [S] of this step, where it has a number for each element
  bool skip_frozen = false;
  bool x_grad = false;  // is the gradient of x wanted?
  // tangents of the parameters: those in `t_w` times the step size, or as they are
  int t_w = -1;
  bool t_scaled = false;
  const T* lr = nullptr;  // [S], of this step
  int S = 1;
  Precision precision = ieee;

  FASTMAML_DEVICE int ld(int b) const { return table.buffer[b].ld; }
  FASTMAML_DEVICE int columns(int b) const { return table.buffer[b].C; }
  FASTMAML_DEVICE int width(int b) const { return whole_vectors<T>(table.buffer[b].C); }
  FASTMAML_DEVICE int rows(int b) const { return layout.n * table.buffer[b].R; }
  FASTMAML_DEVICE Place<T> value(int b) const { return shared<T>() + layout.buffers[b].value; }
  FASTMAML_DEVICE Place<T> t_value(int b) const { return shared<T>() + layout.buffers[b].t_value; }
  FASTMAML_DEVICE Place<T> grad(int b) const { return shared<T>() + layout.buffers[b].grad; }
  FASTMAML_DEVICE Place<T> t_grad(int b) const { return shared<T>() + layout.buffers[b].t_grad; }
  FASTMAML_DEVICE Place<T> param(int p) const { return shared<T>() + table.w + table.param[p].at; }

  // Is the gradient of a buffer wanted that moves with the parameters, or only with x?
  FASTMAML_DEVICE bool wants_grad(int moves) const { return moves || x_grad; }
  FASTMAML_DEVICE bool wants_param_grad(int p) const {
    return p >= 0 && (grad_dst >= 0 || multiplies) && !(skip_frozen && !table.param[p].adapt);
  }

  // The step size of a parameter; where it has one for each element these are apart.
  FASTMAML_DEVICE T rate(int p) const {
    if (!table.param[p].adapt) return T(0);
    return S == 1 ? lr[0] : S == table.params ? lr[p] : T(1);
  }
  FASTMAML_DEVICE const T* rates(int p) const {
    return S == 1 || S == table.params ? nullptr : lr + table.param[p].flat;
  }

  FASTMAML_DEVICE ParamGrad<T> param_grad(int p, int first) const {
    const ParamRow& q = table.param[p];
    const int base = first ? grad_base : grad_dst;
    ParamGrad<T> g{};
    g.writes = grad_dst >= 0;
    g.dst = grad_dst + q.at;
    g.base = base < 0 ? -1 : base + q.at;
    g.scale = descends ? -rate(p) : grad_scale;
    g.rates = descends ? rates(p) : nullptr;
    g.primal = grad_primal;
    g.multiplies = multiplies && q.adapt;
    g.v = t_w + q.at;
    g.each_product = products ? products + q.flat : nullptr;
    return g;
  }
  FASTMAML_DEVICE ParamTangent<T> param_tangent(int p) const {
    const ParamRow& q = table.param[p];
    return {t_w + q.at, t_scaled ? rate(p) : T(1), t_scaled && q.adapt ? rates(p) : nullptr};
  }
};

// `size` numbers of a tangent from `e` on in shared memory, `flat` of the flat vector; zeros after them
template <class T>
FASTMAML_DEVICE Vec<T> load_tangent(const ParamTangent<T>& t, int e, int flat, int size) {
  Vec<T> v = load(shared<T>() + t.at + e);
#pragma unroll
  for (int j = 0; j < lanes<T>; ++j) {
    v.at[j] *= t.factor;
    if (t.rates) v.at[j] *= j < size ? t.rates[flat + j] : T(0);
  }
  return v;
}

template <class T>
FASTMAML_DEVICE T load_tangent(const ParamTangent<T>& t, int e, int flat) {
  const T v = t.factor * shared<T>()[t.at + e];
  return t.rates ? v * t.rates[flat] : v;
}

// The same of a gradient: writes it, and returns what it adds to <v, g>.
template <bool Dual, class T, int n>
FASTMAML_DEVICE T finish(const ParamGrad<T>& to, int e, int flat, int size, const Vec<T, n>& g,
                         const Vec<T, n>& t_g) {
  T product = 0;
  if (to.multiplies) {
    const Vec<T, n> v = load<n>(shared<T>() + to.v + e);
#pragma unroll
    for (int j = 0; j < n; ++j) {
      if (j >= size) continue;
      const T part = v.at[j] * g.at[j];
      if (to.each_product)
        to.each_product[flat + j] -= part;
      else
        product += part;
    }
  }
  if (to.writes) {
    Vec<T, n> sum{};
    if (to.base >= 0) sum = load<n>(shared<T>() + to.base + e);
#pragma unroll
    for (int j = 0; j < n; ++j) {
      T scale = to.scale;
      if (to.rates) scale *= j < size ? to.rates[flat + j] : T(0);
      sum.at[j] += scale * (Dual ? t_g.at[j] : g.at[j]);
      if (Dual && to.primal != 0) sum.at[j] += to.primal * g.at[j];
    }
    store(shared<T>() + to.dst + e, sum);
  }
  return product;
}

// The end of a parameter's gradient: each warp adds its part of <v, g> up.
template <class T>
FASTMAML_DEVICE void finish_products(const Pass<T>& p, int param, T product) {
  if (!p.multiplies || p.products) return;
  product = warp_sum(product);
  if (lane() == 0) shared<T>()[p.table.products + param * warps() + warp()] += product;
}

// g = sum over rows of a b and t_g = the sum of `Terms` such, b being all ones where there are none: the
// gradient of a norm's weight, or of a bias. The last threads take it: the first may still be busy with a
// matrix.
template <class T>
struct ColumnTerm {
  Place<T> a, b;
};
template <bool Ones, class T>
FASTMAML_DEVICE void add_term(Vec<T>& sum, const ColumnTerm<T>& term, int at) {
  const Vec<T> a = load(term.a + at);
  Vec<T> b{};
  if constexpr (!Ones) b = load(term.b + at);
#pragma unroll
  for (int j = 0; j < lanes<T>; ++j) sum.at[j] += Ones ? a.at[j] : a.at[j] * b.at[j];
}
template <bool Dual, int Terms, class T>
FASTMAML_DEVICE void column_sums(const Pass<T>& p, int param, int first, int buffer, const ColumnTerm<T>& g,
                                 const ColumnTerm<T>& t_g0, const ColumnTerm<T>& t_g1) {
  constexpr bool ones = Terms == 0;
  const ParamGrad<T> to = p.param_grad(param, first);
  const int rows = p.rows(buffer), columns = p.columns(buffer), ld = p.ld(buffer);
  T product = 0;
  for (int c = (threads() - 1 - thread()) * lanes<T>; c < columns; c += threads() * lanes<T>) {
    Vec<T> sum{}, t_sum{};
    for (int r = 0; r < rows; ++r) {
      add_term<ones>(sum, g, r * ld + c);
      if (Dual) add_term<ones>(t_sum, t_g0, r * ld + c);
      if (Dual && Terms == 2) add_term<ones>(t_sum, t_g1, r * ld + c);
    }
    product += finish<Dual>(to, c, c, columns - c, sum, t_sum);
  }
  finish_products(p, param, product);
}

}  // namespace fastmaml::cuda::FASTMAML_TEAM
