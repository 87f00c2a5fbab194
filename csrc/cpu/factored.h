// A linear layer whose fast weights are never formed. SGD changes a weight by outer products of the layer's
// inputs x_j and output gradients d_j [n, ..] of the steps, and so does the adjoint recursion with v:
//   W_k = theta - sum_{j<k} a_j d_j^T x_j
//   v_k = -(d_q^T x_q + sum_{j>=k} t_d_j^T x_j + d_j^T t_x_j)       d_q: of the query set, times -1
// where the tangents t are those of the dual sweep of step j, along u = a_j v_{j+1}. So with x for either of
// x_k, t_x_k
//   x W_k^T   = x theta^T + sum_{j<k} (-a_j x x_j^T) d_j
//   x_k u^T   = (-a_k x_q x_k^T)^T d_q + sum_{j>k} (-a_k x_j x_k^T)^T t_d_j + (-a_k t_x_j x_k^T)^T d_j
// and with the parts of x and d exchanged
//   d W_k     = d theta + sum_{j<k} (-a_j d d_j^T) x_j
//   d_k u     = (-a_k d_q d_k^T)^T x_q + sum_{j>k} (-a_k d_j d_k^T)^T t_x_j + (-a_k t_d_j d_k^T)^T x_j
// Everything in brackets is a Gram matrix that an earlier sweep has made: each is computed once, and kept
// with its factor -a. The rows are those that the sweeps leave in their frames. The products with theta are
// done for the rows of all tasks side by side, the others by task.
//
// Where the input is x itself, it is the same in every step: with e_k = sum_{j<k} -a_j d_j and f_k =
// sum_{j>k} t_d_j
//   x W_k^T = x theta^T + (x x_s^T) e_k,   x_s u^T = -a_k ((x_q x_s^T)^T d_q + (x_s x_s^T) f_k),
//   v_k = -(d_q^T x_q + f_{k-1}^T x_s),    x theta^T and the Grams once for all steps.
#pragma once
#include "linear.h"
#include "packed.h"
#include "parallel.h"

namespace fastmaml::FASTMAML_ISA {

template <class T>
struct Theta {
  Packed<T> forward, backward;  // x theta^T [I, O], d theta [O, I]
  const T* rates;               // [K]: the weight's step sizes, 0 if it is frozen
};

// The two factors of a layer's gradient d^T x.
enum class Side { x, d };

// d^T x
template <class T>
struct OuterProduct {
  const T *d, *x;
  int64_t rows;
};

// A sweep over the tasks side by side, and where the rows of the others are.
template <class T>
struct Sweep {
  std::vector<Pass<T>> tasks;                // of this sweep
  const std::vector<Pass<T>>*first, *query;  // of step 0, of the query set
  int64_t frame, t_frame;                    // from a step's frames to the next one's
  int64_t offset, begin;                     // of those side by side in the group; of this sweep's among them
  int64_t k, K;                              // the steps before this sweep, and all steps
  bool on_query;
  bool grams;  // are those of d wanted where the gradient of the input is not?

  int64_t rows(const OpPlan& o) const { return tasks[0].rows(o.op.in0); }
};

// What a layer of form `factored` keeps for the tasks side by side.
template <class T>
struct FactoredLayer {
  const OpPlan& o;
  const Theta<T>& theta;
  int64_t n, q, ld;  // rows of a task in the two sets; of the Grams
  int64_t K;
  T* grams;
  std::vector<Factors<T>> products;

  static int64_t gram_ld(int64_t n, int64_t K) { return round_up(std::max<int64_t>(n * K, 1), lanes<T>); }
  static int64_t size(int64_t n, int64_t q, int64_t K) { return (4 * n * K + 2 * q) * gram_ld(n, K); }

  FactoredLayer(const OpPlan& o, const Theta<T>& theta, int64_t n, int64_t q, int64_t K, T* memory)
      : o(o), theta(theta), n(n), q(q), ld(gram_ld(n, K)), K(K), grams(memory), products(2 * K + 2) {}

  // -a_j y x_j^T for all rows y of all steps [K n, ld]; y: x or t_x, d or t_d
  T* gram(Side side, bool tangent, int64_t g) const {
    return grams + g * size(n, q, K) + (2 * (side == Side::d) + tangent) * n * K * ld;
  }
  T* query_gram(Side side, int64_t g) const {
    return grams + g * size(n, q, K) + (4 * n * K + (side == Side::d) * q) * ld;
  }
  // a step of size 0 leaves no trace in W, but its size may have a derivative
  T gram_scale(int64_t j) const { return theta.rates[j] == 0 ? T(-1) : -theta.rates[j]; }

  int64_t ld_of(const Pass<T>& p, Side side) const { return p.ld(side == Side::x ? o.op.in0 : o.op.out); }
  const T* rows_of(const Pass<T>& p, Side side, bool tangent) const {
    if (side == Side::x) return tangent ? p.t_value(o.op.in0) : p.value(o.op.in0);
    return tangent ? p.t_grad(o.op.out) : p.grad(o.op.out);
  }
  const T* rows_of_step(const Sweep<T>& s, int64_t j, int64_t g, Side side, bool tangent) const {
    const bool moves = side == Side::d || o.op.in0 != 0;  // x has no frame
    return rows_of((*s.first)[g], side, tangent) + (moves ? j * (tangent ? s.t_frame : s.frame) : 0);
  }
  bool has_tangent(Side side) const { return side == Side::d || o.tangent_in0; }

  // The Grams of this sweep's rows with those of the steps before.
  template <bool Dual>
  void make_grams(const Sweep<T>& s, const Pass<T>& p, int64_t g, Side side) const {
    if (!p.plan.program.params[o.op.w].adapt || (Dual && !has_tangent(side))) return;
    const int64_t rows = s.rows(o), ld_rows = ld_of(p, side);
    T* const at = s.on_query ? query_gram(side, g) : gram(side, Dual, g) + s.k * n * ld;
    for (int64_t j = 0; j < s.k; ++j) {
      const Factors<T> f{rows_of(p, side, Dual),
                         ld_rows,
                         1,
                         rows_of_step(s, j, g, side, false),
                         ld_rows,
                         p.plan.program.buffers[side == Side::x ? o.op.in0 : o.op.out].C};
      nt<T, 1>(rows, n, &f, at + j * n, ld, Activate<T>{});
      const T scale = gram_scale(j);
      for (int64_t m = 0; m < rows; ++m)
        for (int64_t i = 0; i < n; ++i) at[m * ld + j * n + i] *= scale;
    }
  }

  // C = e(all but the product with theta), for the rows on `side`
  template <bool Dual>
  void add_steps(const Sweep<T>& s, const Pass<T>& p, int64_t g, Side side, T* C, int64_t ldc,
                 int64_t columns, const Activate<T>& e) {
    const Side other = side == Side::x ? Side::d : Side::x;
    const int64_t ld_other = ld_of(p, other);
    int64_t count = 0;
    auto add = [&](const T* a, bool transposed, const T* b, int64_t rows) {
      products[count++] = {a, transposed ? 1 : ld, transposed ? ld : 1, b, ld_other, rows};
    };
    const T* const own = s.on_query ? query_gram(side, g) : gram(side, Dual, g) + s.k * n * ld;
    for (int64_t j = 0; j < s.k && (!Dual || has_tangent(side)); ++j)
      if (theta.rates[j] != 0) add(own + j * n, false, rows_of_step(s, j, g, other, false), n);
    if (Dual && theta.rates[s.k] != 0) {
      add(query_gram(side, g) + s.k * n, true, rows_of((*s.query)[g], other, false), q);
      for (int64_t j = s.k + 1; j < K; ++j) {
        const int64_t block = j * n * ld + s.k * n;
        if (has_tangent(other))
          add(gram(side, false, g) + block, true, rows_of_step(s, j, g, other, true), n);
        if (has_tangent(side)) add(gram(side, true, g) + block, true, rows_of_step(s, j, g, other, false), n);
      }
    }
    nn<T, 0>(s.rows(o), columns, products.data(), C, ldc, e, count);
  }

  template <bool Dual>
  void forward(const Sweep<T>& s) {
    const Op& op = o.op;
    const Pass<T>& all = s.tasks[0];
    const int64_t rows = s.rows(o), ldy = all.ld(op.out);
    const bool shared = !Dual || o.tangent_in0;
    Activate<T> end;
    if (Dual) {
      if (op.act) end.mask = all.value(op.out), end.ld_mask = ldy, end.mask_slope = op.slope;
    } else {
      end.act = op.act, end.slope = op.slope;
    }
    for (std::size_t g = 0; g < s.tasks.size(); ++g) {
      const Pass<T>& p = s.tasks[g];
      Activate<T> e = shared ? Activate<T>{} : end;
      if (e.mask) e.mask = p.value(op.out);
      e.bias = Dual ? p.t_param(op.b) : p.param(op.b);
      make_grams<Dual>(s, p, s.begin + g, Side::x);
      add_steps<Dual>(s, p, s.begin + g, Side::x, Dual ? p.t_value(op.out) : p.out(op.out), ldy,
                      p.plan.program.buffers[op.out].C, e);
    }
    if (!shared) return;
    end.add = true;
    theta.forward.times(s.tasks.size() * rows, rows_of(all, Side::x, Dual), all.ld(op.in0),
                        Dual ? all.t_value(op.out) : all.out(op.out), ldy, end);
  }

  template <bool Dual>
  void backward(const Sweep<T>& s) {
    const Op& op = o.op;
    const Pass<T>& all = s.tasks[0];
    const int64_t rows = s.rows(o), ldx = all.ld(op.in0);
    const bool wanted = all.wants_grad(o.tangent_in0);
    for (std::size_t g = 0; g < s.tasks.size(); ++g) {
      const Pass<T>& p = s.tasks[g];
      if (p.wants_param_grad(op.b)) bias_grad<Dual>(o, p);
      if (wanted || s.grams) make_grams<Dual>(s, p, s.begin + g, Side::d);
      if (!wanted) continue;
      Activate<T> e;
      e.add = !o.first_in0;
      add_steps<Dual>(s, p, s.begin + g, Side::d, Dual ? p.t_grad(op.in0) : p.grad(op.in0), ldx,
                      p.plan.program.buffers[op.in0].C, e);
    }
    if (!wanted) return;
    Activate<T> end;
    end.add = true;
    if (op.mask) end.mask = all.value(op.in0), end.ld_mask = ldx, end.mask_slope = op.mask_slope;
    theta.backward.times(s.tasks.size() * rows, rows_of(all, Side::d, Dual), all.ld(op.out),
                         Dual ? all.t_grad(op.in0) : all.grad(op.in0), ldx, end);
  }

  // -<v_{k+1}, g_k> with g_k = d_k^T x_k, by <a^T b, d^T x> = <a d^T, b x^T>
  double lr_grad(int64_t k, int64_t g, bool first_order) const {
    const double scale = 1 / (double(gram_scale(k)) * double(gram_scale(k)));
    auto inner = [&](const T* a, const T* b, int64_t rows) {
      double total = 0;
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = k * n; i < (k + 1) * n; ++i) total += double(a[r * ld + i]) * double(b[r * ld + i]);
      return total;
    };
    double total = inner(query_gram(Side::d, g), query_gram(Side::x, g), q);
    if (!first_order && k + 1 < K) {
      const int64_t later = (k + 1) * n * ld, rows = (K - 1 - k) * n;
      total += inner(gram(Side::d, true, g) + later, gram(Side::x, false, g) + later, rows);
      if (o.tangent_in0)
        total += inner(gram(Side::d, false, g) + later, gram(Side::x, true, g) + later, rows);
    }
    return scale * total;
  }

  // The outer products in -v_0: that of the query set, then each step's.
  int64_t outer_products(bool first_order) const { return first_order ? 1 : 1 + K * (o.tangent_in0 ? 2 : 1); }
  OuterProduct<T> outer_product(const Sweep<T>& s, int64_t kind, int64_t task, int64_t tasks) const {
    const Pass<T>& query = (*s.query)[task];
    if (kind == 0) return {rows_of(query, Side::d, false), rows_of(query, Side::x, false), tasks * q};
    const int64_t j = (kind - 1) % K;
    const bool second = kind > K;
    return {rows_of_step(s, j, task, Side::d, !second), rows_of_step(s, j, task, Side::x, second), tasks * n};
  }
};

// What a layer of form `fixed_input` keeps: `support` and `query` for the group of tasks that share the
// product of x with theta, the rest for those side by side.
template <class T>
struct FixedInputLayer {
  const OpPlan& o;
  const Theta<T>& theta;
  int64_t n, q, ld, ld_gram;
  T *support, *query;  // x theta^T [tasks n, ld], [tasks q, ld]; on the way back f_k and d_q
  T *e, *gram, *query_gram, *scaled, *scratch;

  static int64_t gram_ld(int64_t n) { return round_up(std::max<int64_t>(n, 1), lanes<T>); }
  static int64_t size(int64_t n, int64_t q, int64_t ld, int64_t group, int64_t tasks) {
    return group * (n + q) * ld + (tasks + 1) * (n * ld + (n + q) * gram_ld(n));
  }

  FixedInputLayer(const OpPlan& o, const Theta<T>& theta, int64_t n, int64_t q, int64_t ld, int64_t group,
                  int64_t tasks, T* memory)
      : o(o), theta(theta), n(n), q(q), ld(ld), ld_gram(gram_ld(n)) {
    support = memory, query = support + group * n * ld;
    e = query + group * q * ld;
    gram = e + tasks * n * ld, query_gram = gram + tasks * n * ld_gram;
    scaled = query_gram + tasks * q * ld_gram;
    scratch = scaled + (n + q) * ld_gram;
  }

  // For tasks whose x are rows of two matrices.
  void multiply(int64_t tasks, const T* x_s, const T* x_q, int64_t ldx) const {
    theta.forward.times(tasks * n, x_s, ldx, support, ld, Activate<T>{});
    theta.forward.times(tasks * q, x_q, ldx, query, ld, Activate<T>{});
  }
  void begin(int64_t g, const T* x_s, const T* x_q, int64_t ldx) const {
    const Factors<T> f{x_s, ldx, 1, x_s, ldx, theta.forward.K}, f_q{x_q, ldx, 1, x_s, ldx, theta.forward.K};
    nt<T, 1>(n, n, &f, gram + g * n * ld_gram, ld_gram, Activate<T>{});
    nt<T, 1>(q, n, &f_q, query_gram + g * q * ld_gram, ld_gram, Activate<T>{});
    std::memset(e + g * n * ld, 0, n * ld * sizeof(T));
  }

  template <bool Dual>
  void forward(const Sweep<T>& s) const {
    const Op& op = o.op;
    for (std::size_t g = 0; g < s.tasks.size(); ++g) {
      const Pass<T>& p = s.tasks[g];
      const int64_t task = s.begin + g;
      Activate<T> end;
      end.bias = Dual ? p.t_param(op.b) : p.param(op.b);
      if constexpr (Dual) {
        if (op.act) end.mask = p.value(op.out), end.ld_mask = ld, end.mask_slope = op.slope;
        along(s, task, -theta.rates[s.k], p.t_value(op.out), end);
      } else {
        end.add = true, end.act = op.act, end.slope = op.slope;
        const int64_t rows = s.on_query ? q : n;
        T* const y = p.out(op.out);
        std::memcpy(y, (s.on_query ? query : support) + (s.offset + task) * rows * ld, rows * ld * sizeof(T));
        const Factors<T> f{
            (s.on_query ? query_gram : gram) + task * rows * ld_gram, ld_gram, 1, e + task * n * ld, ld, n};
        nn<T, 0>(rows, theta.forward.columns, &f, y, ld, end, s.k > 0);
      }
    }
  }

  template <bool Dual>
  void backward(const Sweep<T>& s) const {
    const Op& op = o.op;
    for (std::size_t g = 0; g < s.tasks.size(); ++g) {
      const Pass<T>& p = s.tasks[g];
      const int64_t task = s.begin + g;
      const T* const d = Dual ? p.t_grad(op.out) : p.grad(op.out);
      if (p.wants_param_grad(op.b)) bias_grad<Dual>(o, p);
      T* const f = support + (s.offset + task) * n * ld;
      if (s.on_query) {
        std::memcpy(query + (s.offset + task) * q * ld, d, q * ld * sizeof(T));
        std::memset(f, 0, n * ld * sizeof(T));
      } else {
        T* const to = Dual ? f : e + task * n * ld;
        const T scale = Dual ? T(1) : -theta.rates[s.k];
        for (int64_t i = 0; i < n * ld; ++i) to[i] += scale * d[i];
      }
    }
  }

  // y = end(scale x_s v^T) with v = d_q^T x_q + f_k^T x_s
  void along(const Sweep<T>& s, int64_t g, T scale, T* y, const Activate<T>& end) const {
    for (int64_t i = 0; i < n * ld_gram; ++i) scaled[i] = scale * gram[g * n * ld_gram + i];
    for (int64_t i = 0; i < q * ld_gram; ++i)
      scaled[n * ld_gram + i] = scale * query_gram[g * q * ld_gram + i];
    const Factors<T> f[2] = {{scaled, ld_gram, 1, support + (s.offset + g) * n * ld, ld, n},
                             {scaled + n * ld_gram, 1, ld_gram, query + (s.offset + g) * q * ld, ld, q}};
    nn<T, 2>(n, theta.forward.columns, f, y, ld, end);
  }

  // -<v_{k+1}, g_k> with g_k = d_k^T x_s
  double lr_grad(const Sweep<T>& s, int64_t k, int64_t g) const {
    along(s, g, T(1), scratch, Activate<T>{});
    const T* const d = (*s.first)[g].grad(o.op.out) + k * s.frame;
    double total = 0;
    for (int64_t r = 0; r < n; ++r)
      for (int64_t i = r * ld; i < r * ld + theta.forward.columns; ++i)
        total += double(d[i]) * double(scratch[i]);
    return total;
  }
};

}  // namespace fastmaml::FASTMAML_ISA
