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
#pragma once
#include "arena.h"
#include "linear.h"
#include "parallel.h"

namespace fastmaml::FASTMAML_ISA {

// A matrix [K, columns] cut into the panels of columns that nn_panel takes, each contiguous.
template <class T>
struct Packed {
  int64_t K, columns;
  T* data;

  static int64_t size(int64_t K, int64_t columns) { return K * round_up(columns, lanes<T>); }

  // the panel of columns c .. c + width of from[k * row + column * step]
  void fill(int64_t c, int64_t width, const T* from, int64_t row, int64_t step) const {
    T* const panel = data + K * c;
    const int64_t some = std::min(width, columns - c);
    for (int64_t k0 = 0; k0 < K; k0 += 16)
      for (int64_t j = 0; j < width; ++j)
        for (int64_t k = k0; k < std::min(k0 + 16, K); ++k)
          panel[k * width + j] = j < some ? from[k * row + (c + j) * step] : T(0);
  }

  // C = e(A this) for A [M, K], without a bias. A block of A that fits in L2 meets every panel; a piece of a
  // panel that fits in L1 meets all rows of the block before the next.
  void times(int64_t M, const T* a, int64_t lda, T* C, int64_t ldc, const Activate<T>& e) const {
    const int64_t deep = (K + 1023) / 1024, fit = std::max<int64_t>((768 << 10) * deep / (K * sizeof(T)), 1),
                  high = (M + fit - 1) / fit;
    for (int64_t i = 0; i < deep; ++i) {
      const int64_t k = K * i / deep, k_end = K * (i + 1) / deep;
      for (int64_t j = 0; j < high; ++j) {
        const int64_t m = M * j / high, rows = M * (j + 1) / high - m;
        Activate<T> end = e;
        if (e.mask) end.mask += m * e.ld_mask;
        column_panels<T>(columns, [&](auto vectors, int64_t c) {
          panel<vectors>(rows, k, k_end, a + m * lda, lda, c, C + m * ldc, ldc, end);
        });
      }
    }
  }

 private:
  template <int vectors>
  void panel(int64_t M, int64_t k_begin, int64_t k_end, const T* a, int64_t lda, int64_t c, T* C, int64_t ldc,
             const Activate<T>& e) const {
    constexpr int64_t width = vectors * lanes<T>, most = (32 << 10) / (width * sizeof(T));
    const int64_t deep = k_end - k_begin, pieces = (deep + most - 1) / most;
    for (int64_t i = 0; i < pieces; ++i) {
      const int64_t k = k_begin + deep * i / pieces, end = k_begin + deep * (i + 1) / pieces;
      Activate<T> part = e;
      if (k > 0) part.add = true;
      if (end < K) part.act = false, part.mask = nullptr;
      const Factors<T> f{a + k, lda, 1, data + K * c + k * width - c, width, end - k};
      nn_panel<T, nn_rows<vectors>, vectors, 1>(M, &f, 1, c, C, ldc, part);
    }
  }
};

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

}  // namespace fastmaml::FASTMAML_ISA
