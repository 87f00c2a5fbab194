// A factored linear layer (factored.h) that reads x itself, the same in every step: its sums have one outer
// product for a set,
//   W_k = omega_k theta + e_k^T x_s             M_k = rho_k theta + m_k^T x_s
//   v_k = -(v_q^T x_q + v_s^T x_s)              n_k = -(n_q^T x_q + n_s^T x_s)
// and a step is that of descent.h on e, m, v and n. x theta^T and the Grams are made once for all steps:
//   x W_k^T = omega_k x theta^T + (x x_s^T) e_k
//   x_s u^T = c_k ((x_q x_s^T)^T n_q + (x_s x_s^T) n_s) + e_k (x_s x_s^T) d_k
// Plain descent has n = -a_k v, and neither m nor n in memory.
#pragma once
#include "factored.h"

namespace fastmaml::FASTMAML_ISA {

// What a layer of form `fixed_input` keeps: products with theta and v for the group of tasks that share the
// product of x with theta, the rest for those side by side.
template <class T>
struct FixedInputLayer {
  const OpPlan& o;
  const Theta<T>& theta;
  const Coefficients<T>& by;
  const bool plain;
  int64_t n, q, ld, ld_gram;
  T *support, *query;  // x theta^T [tasks n, ld], [tasks q, ld]
  T *v_s, *v_q;        // as these; in their place where they are read no more
  T *e, *m, *n_s, *n_q, *gram, *query_gram, *scaled, *scratch;
  OwnVector<double> squares;  // [tasks, n, n]: x_s x_s^T, for the norm

  static int64_t gram_ld(int64_t n) { return round_up(std::max<int64_t>(n, 1), lanes<T>); }
  // plain: are there no m and n; once: is v made after all products with theta have been read?
  static int64_t size(int64_t n, int64_t q, int64_t ld, int64_t group, int64_t tasks, bool plain, bool once) {
    return ((once ? 1 : 2) * group * (n + q) + (plain ? 1 : 3) * tasks * n + (plain ? 0 : tasks * q) +
            2 * n) *
               ld +
           ((tasks + 1) * (n + q) + n) * gram_ld(n);
  }

  FixedInputLayer(const OpPlan& o, const Theta<T>& theta, int64_t n, int64_t q, int64_t ld, int64_t group,
                  int64_t tasks, bool plain, bool once, bool clips, T* at)
      : o(o),
        theta(theta),
        by(theta.by),
        plain(plain),
        n(n),
        q(q),
        ld(ld),
        ld_gram(gram_ld(n)),
        squares(clips ? tasks * n * n : 0) {
    auto take = [&](int64_t size) { return std::exchange(at, at + size); };
    support = take(group * n * ld), query = take(group * q * ld);
    v_s = once ? support : take(group * n * ld), v_q = once ? query : take(group * q * ld);
    e = take(tasks * n * ld);
    m = n_s = n_q = nullptr;
    if (!plain) m = take(tasks * n * ld), n_s = take(tasks * n * ld), n_q = take(tasks * q * ld);
    gram = take(tasks * n * ld_gram), query_gram = take(tasks * q * ld_gram);
    scaled = take((2 * n + q) * ld_gram), scratch = take(2 * n * ld);
  }

  // For tasks whose x are rows of two matrices.
  void multiply(int64_t tasks, const T* x_s, const T* x_q, int64_t ldx) const {
    theta.forward.times(tasks * n, x_s, ldx, support, ld, Activate<T>{});
    theta.forward.times(tasks * q, x_q, ldx, query, ld, Activate<T>{});
  }
  void begin(int64_t g, const T* x_s, const T* x_q, int64_t ldx) {
    const Factors<T> f{x_s, ldx, 1, x_s, ldx, theta.forward.K}, f_q{x_q, ldx, 1, x_s, ldx, theta.forward.K};
    nt<T, 1>(n, n, &f, gram + g * n * ld_gram, ld_gram, Activate<T>{});
    nt<T, 1>(q, n, &f_q, query_gram + g * q * ld_gram, ld_gram, Activate<T>{});
    std::memset(e + g * n * ld, 0, n * ld * sizeof(T));
    if (!plain) std::memset(m + g * n * ld, 0, n * ld * sizeof(T));
    for (int64_t r = 0; r < n && !squares.empty(); ++r)
      for (int64_t i = 0; i < n; ++i)
        squares[(g * n + r) * n + i] = wide_dot(x_s + r * ldx, x_s + i * ldx, theta.forward.K);
  }

  template <bool Dual>
  void forward(const Sweep<T>& s) const {
    const Op& op = o.op;
    for (std::size_t i = 0; i < s.tasks.size(); ++i) {
      const Pass<T>& p = s.tasks[i];
      const int64_t g = s.begin + i;
      Activate<T> end;
      end.bias = Dual ? p.t_param(op.b) : p.param(op.b);
      if constexpr (Dual) {
        if (op.act) end.mask = p.value(op.out), end.ld_mask = ld, end.mask_slope = op.slope;
        const bool adapts = p.plan.program.params[op.w].adapt;
        const T along_g = s.along_g && adapts ? s.along_g[g] : T(0);
        along(s, g, plain ? -by.rates[s.k] : s.clip(g, s.k), !plain, p.t_value(op.out), end, along_g,
              p.grad(op.out));
      } else {
        end.add = true, end.act = op.act, end.slope = op.slope;
        const int64_t rows = s.on_query ? q : n;
        const T* const from = (s.on_query ? query : support) + (s.offset + g) * rows * ld;
        const T omega = by.omega[s.k];
        T* const y = p.out(op.out);
        if (omega == 1)
          std::memcpy(y, from, rows * ld * sizeof(T));
        else
          for (int64_t j = 0; j < rows * ld; ++j) y[j] = omega * from[j];
        const Factors<T> f{
            (s.on_query ? query_gram : gram) + g * rows * ld_gram, ld_gram, 1, e + g * n * ld, ld, n};
        nn<T, 0>(rows, theta.forward.columns, &f, y, ld, end, s.k > 0);
      }
    }
  }

  template <bool Dual>
  void backward(const Sweep<T>& s) const {
    const Op& op = o.op;
    for (std::size_t i = 0; i < s.tasks.size(); ++i) {
      const Pass<T>& p = s.tasks[i];
      const int64_t g = s.begin + i;
      const T* const d = Dual ? p.t_grad(op.out) : p.grad(op.out);
      if (p.wants_param_grad(op.b)) bias_grad<Dual>(o, p);
      T *const to_s = v_s + (s.offset + g) * n * ld, *const to_q = v_q + (s.offset + g) * q * ld;
      if (s.on_query && s.k == s.K) {
        std::memcpy(to_q, d, q * ld * sizeof(T));
        std::memset(to_s, 0, n * ld * sizeof(T));
        if (plain) continue;
        std::memset(n_s + g * n * ld, 0, n * ld * sizeof(T));
        std::memset(n_q + g * q * ld, 0, q * ld * sizeof(T));
      } else if (s.on_query || Dual) {
        T* const to = s.on_query ? to_q : to_s;
        for (int64_t j = 0; j < (s.on_query ? q : n) * ld; ++j) to[j] += d[j];
      }
    }
  }

  // W_{k+1} from the gradient of this sweep
  void descend(const Sweep<T>& s, int64_t g) const {
    const T* const d = s.tasks[g].grad(o.op.out);
    const T a = by.rates[s.k], c = s.clip(g, s.k);
    const T momentum = T(by.momentum), decay = T(by.weight_decay);
    T *const e_g = e + g * n * ld, *const m_g = plain ? nullptr : m + g * n * ld;
    for (int64_t i = 0; i < n * ld; ++i) {
      if (plain) {
        e_g[i] -= a * d[i];
      } else {
        m_g[i] = momentum * m_g[i] + c * d[i] + decay * e_g[i];
        e_g[i] -= a * m_g[i];
      }
    }
  }
  // sum_{j<k} scale(j) d_j
  template <class F>
  void sum_steps(const Sweep<T>& s, int64_t g, int64_t k, T* to, const F& scale) const {
    std::memset(to, 0, n * ld * sizeof(T));
    for (int64_t j = 0; j < k; ++j) {
      const T* const d = (*s.first)[g].grad(o.op.out) + j * s.frame;
      const T by = scale(j);
      for (int64_t i = 0; i < n * ld && by != 0; ++i) to[i] += by * d[i];
    }
  }
  // W_k again, on the way back
  void rewind(const Sweep<T>& s, int64_t k, int64_t g) const {
    sum_steps(s, g, k, e + g * n * ld, [&](int64_t j) { return -by.of(by.alpha, k, j) * s.clip(g, j); });
  }
  // n_{k+1}, and what it adds to v
  void step_back(const Sweep<T>& s, int64_t k, int64_t g) const {
    if (plain) return;
    const T momentum = T(by.momentum), decay = T(by.weight_decay), a = by.rates[k];
    auto both = [&](T* v, T* n, int64_t size) {
      for (int64_t i = 0; i < size; ++i) n[i] = momentum * n[i] - a * v[i], v[i] += decay * n[i];
    };
    both(v_s + (s.offset + g) * n * ld, n_s + g * n * ld, n * ld);
    both(v_q + (s.offset + g) * q * ld, n_q + g * q * ld, q * ld);
  }

  // y = end(-scale x_s v^T + more (x_s x_s^T) d), or of n
  void along(const Sweep<T>& s, int64_t g, T scale, bool of_n, T* y, const Activate<T>& end, T more = 0,
             const T* d = nullptr) const {
    const T *const x_x = gram + g * n * ld_gram, *const x_q = query_gram + g * q * ld_gram;
    T *const scaled_q = scaled + n * ld_gram, *const scaled_d = scaled_q + q * ld_gram;
    for (int64_t i = 0; i < n * ld_gram; ++i) scaled[i] = scale * x_x[i];
    for (int64_t i = 0; i < q * ld_gram; ++i) scaled_q[i] = scale * x_q[i];
    for (int64_t i = 0; i < n * ld_gram && more != 0; ++i) scaled_d[i] = more * x_x[i];
    const T* const of_s = of_n ? n_s + g * n * ld : v_s + (s.offset + g) * n * ld;
    const T* const of_q = of_n ? n_q + g * q * ld : v_q + (s.offset + g) * q * ld;
    const Factors<T> f[3] = {{scaled, ld_gram, 1, of_s, ld, n},
                             {scaled_q, 1, ld_gram, of_q, ld, q},
                             {scaled_d, ld_gram, 1, d, ld, n}};
    nn<T, 0>(n, theta.forward.columns, f, y, ld, end, more == 0 ? 2 : 3);
  }

  static double dot(const T* a, const T* b, int64_t rows, int64_t ld, int64_t columns) {
    double total = 0;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = r * ld; i < r * ld + columns; ++i) total += double(a[i]) * double(b[i]);
    return total;
  }
  // -<v_{k+1}, M_{k+1}>
  double lr_grad(const Sweep<T>& s, int64_t k, int64_t g, bool) const {
    const int64_t O = theta.forward.columns;
    T *const x_v = scratch, *const m_k = scratch + n * ld;
    along(s, g, T(1), false, x_v, Activate<T>{});
    sum_steps(s, g, k + 1, m_k, [&](int64_t j) { return by.of(by.beta, k + 1, j) * s.clip(g, j); });
    double total = dot(x_v, m_k, n, ld, O);
    if (by.decays()) {
      const int64_t at = s.offset + g;
      total += by.rho[k + 1] * (dot(v_s + at * n * ld, support + at * n * ld, n, ld, O) +
                                dot(v_q + at * q * ld, query + at * q * ld, q, ld, O));
    }
    return total;
  }
  // <g_k, n_{k+1}>
  double along(const Sweep<T>& s, int64_t k, int64_t g) const {
    along(s, g, T(1), true, scratch, Activate<T>{});
    return -dot(scratch, (*s.first)[g].grad(o.op.out) + k * s.frame, n, ld, theta.forward.columns);
  }
  // |g_k|^2 of this sweep's step
  double square(const Sweep<T>& s, int64_t g) const {
    const T* const d = s.tasks[g].grad(o.op.out);
    double total = 0;
    for (int64_t r = 0; r < n; ++r)
      for (int64_t i = 0; i < n; ++i)
        total += wide_dot(d + r * ld, d + i * ld, theta.forward.columns) * squares[(g * n + r) * n + i];
    return total;
  }

  // of the query set, of x_s; x: that set's
  OuterProduct<T> outer_product(int64_t kind, int64_t task, int64_t tasks, const T* x, int64_t ldx) const {
    if (kind == 0) return {v_q + task * q * ld, x + task * q * ldx, tasks * q};
    return {v_s + task * n * ld, x + task * n * ldx, tasks * n};
  }
};

}  // namespace fastmaml::FASTMAML_ISA
