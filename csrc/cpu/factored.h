// A linear layer whose fast weights are never formed. SGD changes a weight by outer products of the layer's
// inputs x_j and output gradients d_j [n, ..] of the steps, and so does the adjoint recursion with v:
//   W_k = omega_k theta - sum_{j<k} alpha_kj c_j d_j^T x_j          (coefficients.h)
//   v_k = -sum_{b>=k} gamma_kb R_b,   R_b = d_qb^T x_qb + t_d_b^T x_b + d_b^T t_x_b
// where d_qb is of the query set after b steps, times -1 and the weight of its loss, and the tangents t are
// those of the dual sweep of step b, along u = sum_{b'>b} c_b delta_bb' R_b' + e_b d_b^T x_b with e of
// clipping. So with x for either of x_k, t_x_k
//   x W_k^T   = omega_k x theta^T - sum_{j<k} alpha_kj c_j (x x_j^T) d_j
//   x_k u^T   = sum_{b>k} c_k delta_kb ((x_qb x_k^T)^T d_qb + (x_b x_k^T)^T t_d_b + (t_x_b x_k^T)^T d_b)
//               + e_k (x_k x_k^T) d_k
// and d W_k, d_k u the same with the parts of x and d exchanged. Everything in brackets is a Gram matrix that
// an earlier sweep has made: each is computed once. The rows are those that the sweeps leave in their frames.
// The products with theta are done for the rows of all tasks side by side, the others by task. Inner products
// of sums of outer products are those of Grams: <a^T b, d^T x> = <a d^T, b x^T>.
#pragma once
#include "arena.h"
#include "coefficients.h"
#include "linear.h"
#include "packed.h"
#include "parallel.h"

namespace fastmaml::FASTMAML_ISA {

template <class T>
struct Theta {
  Packed<T> forward, backward;  // x theta^T [I, O], d theta [O, I]
  Coefficients<T> by;
};

// The two factors of a layer's gradient d^T x.
enum class Side { x, d };

// d^T x
template <class T>
struct OuterProduct {
  const T *d, *x;
  int64_t rows;
};

// What a layer of form `factored` keeps for the tasks side by side.
template <class T>
struct FactoredLayer {
  const OpPlan& o;
  const Theta<T>& theta;
  const Coefficients<T>& by;
  int64_t n, q, B, ld;  // rows of a task in the two sets; query sets in v; of the Grams
  int64_t K;
  T* grams;
  OwnVector<Factors<T>> products;
  OwnVector<double> inner;  // [tasks, B + K, K + 1]: <R_b, g_j> of query sets and dual sweeps; <R_b, theta>

  static int64_t gram_ld(int64_t n, int64_t K) { return round_up(std::max<int64_t>(n * K, 1), lanes<T>); }
  static int64_t size(int64_t n, int64_t q, int64_t K, int64_t B) {
    return (4 * n * K + 2 * q * B) * gram_ld(n, K);
  }
  static int64_t scaled_size(int64_t n, int64_t q, int64_t K, int64_t B) {
    return (1 + std::max(n, q)) * gram_ld(n, K) + (2 * n * K + q * B + n) * round_up(n, lanes<T>);
  }

  // met: tasks whose inner products are wanted
  FactoredLayer(const OpPlan& o, const Theta<T>& theta, int64_t n, int64_t q, int64_t K, int64_t B,
                int64_t met, T* memory)
      : o(o),
        theta(theta),
        by(theta.by),
        n(n),
        q(q),
        B(B),
        ld(gram_ld(n, K)),
        K(K),
        grams(memory),
        products(3 * K + B + 1),
        inner(met * (B + K) * (K + 1)) {}

  // y x_j^T for all rows y of all steps [K n, ld]; y: x or t_x, d or t_d
  T* gram(Side side, bool tangent, int64_t g) const {
    return grams + g * size(n, q, K, B) + (2 * (side == Side::d) + tangent) * n * K * ld;
  }
  T* query_gram(Side side, int64_t i, int64_t g) const {
    return grams + g * size(n, q, K, B) + (4 * n * K + (2 * i + (side == Side::d)) * q) * ld;
  }
  double* inner_of(int64_t g, int64_t b) { return inner.data() + (g * (B + K) + b) * (K + 1); }

  static Side other(Side side) { return side == Side::x ? Side::d : Side::x; }
  int64_t buffer(Side side) const { return side == Side::x ? o.op.in0 : o.op.out; }
  int64_t ld_of(const Pass<T>& p, Side side) const { return p.ld(buffer(side)); }
  int64_t columns(const Pass<T>& p, Side side) const { return p.plan.program.buffers[buffer(side)].C; }
  T* rows_of(const Pass<T>& p, Side side, bool tangent) const {
    if (side == Side::x) return tangent ? p.t_value(o.op.in0) : const_cast<T*>(p.value(o.op.in0));
    return tangent ? p.t_grad(o.op.out) : p.grad(o.op.out);
  }
  bool moves(Side side) const { return side == Side::d || o.op.in0 != 0; }  // x has no frame
  T* rows_of_step(const Sweep<T>& s, int64_t j, int64_t g, Side side, bool tangent) const {
    return rows_of((*s.first)[g], side, tangent) + (moves(side) ? j * (tangent ? s.t_frame : s.frame) : 0);
  }
  T* rows_of_query(const Sweep<T>& s, int64_t i, int64_t g, Side side) const {
    return rows_of((*s.query)[g], side, false) + (moves(side) ? i * s.query_frame : 0);
  }
  bool has_tangent(Side side) const { return side == Side::d || o.tangent_in0; }
  bool adapts(const Sweep<T>& s) const { return s.tasks[0].plan.program.params[o.op.w].adapt; }
  T* own_gram(const Sweep<T>& s, Side side, bool tangent, int64_t g) const {
    return s.on_query ? query_gram(side, s.query_index(), g) : gram(side, tangent, g) + s.k * n * ld;
  }

  // The Grams of this sweep's rows with those of the steps before.
  template <bool Dual>
  void make_grams(const Sweep<T>& s, const Pass<T>& p, int64_t g, Side side) const {
    if (!adapts(s) || (Dual && !has_tangent(side))) return;
    const int64_t ld_rows = ld_of(p, side), end = s.k + (s.own_grams && !Dual && !s.on_query);
    T* const at = own_gram(s, side, Dual, g);
    for (int64_t j = 0; j < end; ++j) {
      const Factors<T> f{rows_of(p, side, Dual), ld_rows, 1, rows_of_step(s, j, g, side, false), ld_rows,
                         columns(p, side)};
      nt<T, 1>(s.rows(o), n, &f, at + j * n, ld, Activate<T>{}, true);
    }
  }

  // C = e(all but the product with theta), for the rows on `side`: the Grams times their coefficients of this
  // sweep, and the rows.
  template <bool Dual>
  void add_steps(const Sweep<T>& s, const Pass<T>& p, int64_t g, Side side, T* C, int64_t ldc,
                 int64_t columns, const Activate<T>& e) {
    const Side by_side = other(side);
    const int64_t ld_other = ld_of(p, by_side), k = s.k, depth = k * n;
    int64_t count = 0;
    T* at = s.scaled;
    if (k > 0 && (!Dual || has_tangent(side))) {
      const int64_t rows = s.rows(o), lda = round_up(depth, lanes<T>);
      const T* const own = own_gram(s, side, Dual, g);
      T *const each = at, *const a = at + lda;
      for (int64_t j = 0; j < k; ++j) {
        const T scale = -by.of(by.alpha, k, j) * s.clip(g, j);
        for (int64_t i = 0; i < n; ++i) each[j * n + i] = scale;
        if (by.of(by.alpha, k, j) != 0)
          products[count++] = {a + j * n, lda, 1, rows_of_step(s, j, g, by_side, false), ld_other, n};
      }
      for (int64_t m = 0; m < rows && count; ++m)
        for (int64_t i = 0; i < depth; i += lanes<T>)
          store(a + m * lda + i, load(own + m * ld + i) * load(each + i));
      at = a + rows * lda;
    }
    const int64_t lda = round_up(n, lanes<T>);
    auto add = [&](T scale, const T* block, const T* b, int64_t rows) {
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < n; i += lanes<T>) store(at + r * lda + i, scale * load(block + r * ld + i));
      products[count++] = {std::exchange(at, at + rows * lda), 1, lda, b, ld_other, rows};
    };
    if (Dual) {
      const T c = s.clip(g, k);
      for (int64_t i = 0; i < B; ++i)
        if (const T delta = by.of(by.delta, k, s.query_steps[i]); s.query_steps[i] > k && delta != 0)
          add(c * delta, query_gram(side, i, g) + k * n, rows_of_query(s, i, g, by_side), q);
      for (int64_t b = k + 1; b < K; ++b) {
        const T delta = by.of(by.delta, k, b);
        if (delta == 0) continue;
        const int64_t block = b * n * ld + k * n;
        if (has_tangent(by_side))
          add(c * delta, gram(side, false, g) + block, rows_of_step(s, b, g, by_side, true), n);
        if (has_tangent(side))
          add(c * delta, gram(side, true, g) + block, rows_of_step(s, b, g, by_side, false), n);
      }
      if (s.along_g && s.along_g[g] != 0 && adapts(s))
        add(s.along_g[g], gram(side, false, g) + k * n * ld + k * n, rows_of_step(s, k, g, by_side, false),
            n);
    }
    nn<T, 0>(s.rows(o), columns, products.data(), C, ldc, e, count);
  }

  // C = e(C + omega_k A theta^T) for A = x or t_x, or A theta for A = d or t_d; C null: none but <R, theta>
  template <bool Dual>
  void add_theta(const Sweep<T>& s, Side side, T* C, int64_t ldc, const Activate<T>& e) {
    const Pass<T>& all = s.tasks[0];
    const Packed<T>& by_theta = side == Side::x ? theta.forward : theta.backward;
    const int64_t rows = s.rows(o), total = s.tasks.size() * rows;
    const T* const a = rows_of(all, side, Dual);
    const T omega = by.omega[s.k];
    const bool meets = s.inner && by.decays() && adapts(s) && (Dual || (s.on_query && side == Side::d));
    if (omega == 1 && C) by_theta.times(total, a, ld_of(all, side), C, ldc, e);
    if (!meets && (omega == 1 || !C)) return;
    by_theta.times(total, a, ld_of(all, side), s.product, ldc, Activate<T>{});
    const int64_t width = columns(all, other(side));
    const T* const b = rows_of(all, other(side), false);
    for (int64_t r = 0; r < total && meets; ++r) {
      double& sum = inner_of(s.begin + r / rows, s.on_query ? s.query_index() : B + s.k)[K];
      for (int64_t i = 0; i < width; ++i) sum += double(s.product[r * ldc + i]) * double(b[r * ldc + i]);
    }
    for (int64_t r = 0; r < total && omega != 1 && C; ++r)
      for (int64_t i = 0; i < width; i += lanes<T>) {
        Vec<T> row[1] = {omega * load(s.product + r * ldc + i)};
        e.template finish<1>(row, r, i, C, ldc);
      }
  }

  template <bool Dual>
  void forward(const Sweep<T>& s) {
    const Op& op = o.op;
    const Pass<T>& all = s.tasks[0];
    const int64_t ldy = all.ld(op.out);
    const bool shared = !Dual || o.tangent_in0;
    Activate<T> end;
    if (Dual) {
      if (op.act) end.mask = all.value(op.out), end.ld_mask = ldy, end.mask_slope = op.slope;
    } else {
      end.act = op.act, end.slope = op.slope;
    }
    for (std::size_t i = 0; i < s.tasks.size(); ++i) {
      const Pass<T>& p = s.tasks[i];
      const int64_t g = s.begin + i;
      Activate<T> e = shared ? Activate<T>{} : end;
      if (e.mask) e.mask = p.value(op.out);
      e.bias = Dual ? p.t_param(op.b) : p.param(op.b);
      if (s.inner && (Dual || s.on_query)) inner_of(g, s.on_query ? s.query_index() : B + s.k)[K] = 0;
      make_grams<Dual>(s, p, g, Side::x);
      add_steps<Dual>(s, p, g, Side::x, Dual ? p.t_value(op.out) : p.out(op.out), ldy, columns(p, Side::d),
                      e);
    }
    if (!shared) return;
    end.add = true;
    add_theta<Dual>(s, Side::x, Dual ? all.t_value(op.out) : all.out(op.out), ldy, end);
  }

  template <bool Dual>
  void backward(const Sweep<T>& s) {
    const Op& op = o.op;
    const Pass<T>& all = s.tasks[0];
    const int64_t ldx = all.ld(op.in0);
    const bool wanted = all.wants_grad(o.tangent_in0);
    for (std::size_t i = 0; i < s.tasks.size(); ++i) {
      const Pass<T>& p = s.tasks[i];
      const int64_t g = s.begin + i;
      if (p.wants_param_grad(op.b)) bias_grad<Dual>(o, p);
      if (wanted || s.grams) make_grams<Dual>(s, p, g, Side::d);
      if (s.inner && (Dual || s.on_query) && adapts(s)) meet<Dual>(s, g);
      if (!wanted) continue;
      Activate<T> e;
      e.add = !o.first_in0;
      add_steps<Dual>(s, p, g, Side::d, Dual ? p.t_grad(op.in0) : p.grad(op.in0), ldx, columns(p, Side::x),
                      e);
    }
    Activate<T> end;
    end.add = true;
    if (op.mask) end.mask = all.value(op.in0), end.ld_mask = ldx, end.mask_slope = op.mask_slope;
    T* const to = Dual ? all.t_grad(op.in0) : all.grad(op.in0);
    add_theta<Dual>(s, Side::d, wanted ? to : nullptr, ldx, end);
  }

  // <R, g_j> of the rows of this sweep
  template <bool Dual>
  void meet(const Sweep<T>& s, int64_t g) {
    double* const to = inner_of(g, Dual ? B + s.k : s.query_index());
    const T* const d = own_gram(s, Side::d, Dual, g);
    const T* const x = own_gram(s, Side::x, false, g);
    const T* const t_x = own_gram(s, Side::x, true, g);
    for (int64_t j = 0; j < s.k; ++j) {
      auto dot = [&](const T* a, const T* b) {
        double total = 0;
        for (int64_t r = 0; r < s.rows(o); ++r)
          for (int64_t i = r * ld + j * n; i < r * ld + (j + 1) * n; ++i)
            total += double(a[i]) * double(b[i]);
        return total;
      };
      to[j] = dot(d, x) + (Dual && o.tangent_in0 ? dot(own_gram(s, Side::d, false, g), t_x) : 0.0);
    }
  }

  // f(b, <R_b, ..> by j) for all that v_{k+1} has
  template <class F>
  void each_of_v(const Sweep<T>& s, int64_t k, int64_t g, bool first_order, const F& f) {
    for (int64_t i = 0; i < B; ++i)
      if (s.query_steps[i] > k) f(s.query_steps[i], inner_of(g, i));
    for (int64_t b = k + 1; b < K && !first_order; ++b) f(b, inner_of(g, B + b));
  }

  // -<v_{k+1}, M_{k+1}>
  double lr_grad(const Sweep<T>& s, int64_t k, int64_t g, bool first_order) {
    double total = 0;
    each_of_v(s, k, g, first_order, [&](int64_t b, const double* inner) {
      double of_m = by.rho[k + 1] * inner[K];
      for (int64_t j = 0; j <= k; ++j) of_m += double(by.of(by.beta, k + 1, j)) * s.clip(g, j) * inner[j];
      total += by.of(by.gamma, k + 1, b) * of_m;
    });
    return total;
  }
  // <g_k, n_{k+1}>
  double along(const Sweep<T>& s, int64_t k, int64_t g) {
    double total = 0;
    each_of_v(s, k, g, false,
              [&](int64_t b, const double* inner) { total -= by.of(by.delta, k, b) * inner[k]; });
    return total;
  }
  // |g_k|^2 of this sweep's step
  double square(const Sweep<T>& s, int64_t g) const {
    const Pass<T>& p = s.tasks[g];
    return squared_norm(n, rows_of(p, Side::d, false), ld_of(p, Side::d), columns(p, Side::d),
                        rows_of(p, Side::x, false), ld_of(p, Side::x), columns(p, Side::x));
  }

  // v_0 = -sum gamma_0b R_b as one of its rows as they are
  void finish(const Sweep<T>& s, int64_t g, bool first_order) {
    auto scale = [&](T* d, int64_t rows, T gamma) {
      for (int64_t i = 0; i < rows * ld_of((*s.first)[g], Side::d); ++i) d[i] *= gamma;
    };
    for (int64_t i = 0; i < B; ++i)
      scale(rows_of_query(s, i, g, Side::d), q, by.of(by.gamma, 0, s.query_steps[i]));
    for (int64_t b = 0; b < K && !first_order; ++b)
      for (bool tangent : {false, true})
        scale(rows_of_step(s, b, g, Side::d, tangent), n, by.of(by.gamma, 0, b));
  }

  // The outer products in -v_0: those of the query sets, then each step's.
  int64_t outer_products(bool first_order) const {
    return B + (first_order ? 0 : K * (o.tangent_in0 ? 2 : 1));
  }
  OuterProduct<T> outer_product(const Sweep<T>& s, int64_t kind, int64_t task, int64_t tasks) const {
    if (kind < B)
      return {rows_of_query(s, kind, task, Side::d), rows_of_query(s, kind, task, Side::x), tasks * q};
    const int64_t j = (kind - B) % K;
    const bool second = kind - B >= K;
    return {rows_of_step(s, j, task, Side::d, !second), rows_of_step(s, j, task, Side::x, second), tasks * n};
  }
};

}  // namespace fastmaml::FASTMAML_ISA
