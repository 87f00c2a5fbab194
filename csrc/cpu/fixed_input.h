// A factored linear layer (factored.h) that reads x itself, the same in every step: with e_k = sum_{j<k} -a_j
// d_j and f_k = sum_{j>k} t_d_j
//   x W_k^T = x theta^T + (x x_s^T) e_k,   x_s u^T = -a_k ((x_q x_s^T)^T d_q + (x_s x_s^T) f_k),
//   v_k = -(d_q^T x_q + f_{k-1}^T x_s),    x theta^T and the Grams once for all steps.
#pragma once
#include "factored.h"

namespace fastmaml::FASTMAML_ISA {

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

  // of the query set, of x_s; x: that set's
  OuterProduct<T> outer_product(int64_t kind, int64_t task, int64_t tasks, const T* x, int64_t ldx) const {
    if (kind == 0) return {query + task * q * ld, x + task * q * ldx, tasks * q};
    return {support + task * n * ld, x + task * n * ldx, tasks * n};
  }
};

}  // namespace fastmaml::FASTMAML_ISA
