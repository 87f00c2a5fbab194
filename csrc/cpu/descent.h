// What a step does to a task's dense parameters, all of them flat, and its derivative:
//
//   c = min(1, max_norm / |g_k|)
//   M_{k+1} = momentum M_k + c g_k + weight_decay W_k
//   W_{k+1} = W_k - a_k M_{k+1}
//
//   n_{k+1} = dL/dM_{k+1} = momentum n_{k+2} - a_k v_{k+1}
//   v_k = v_{k+1} + weight_decay n_{k+1} + H_k (c n_{k+1} + c' <g_k, n_{k+1}> g_k)
//
// Plain descent has M = g and n = -a v; its step is the epilogue of the weight gradients (pass.h).
#pragma once
#include <limits>

#include "call.h"

namespace fastmaml::FASTMAML_ISA {

template <class T>
struct Descent {
  const Call<T>& c;
  const Plan& plan;
  const Request& q;
  const T momentum = T(q.momentum), weight_decay = T(q.weight_decay), max_norm = T(q.max_norm);

  explicit Descent(const Call<T>& call) : c(call), plan(call.plan), q(call.q) {}

  bool clips() const { return !q.plain && max_norm < std::numeric_limits<T>::infinity(); }
  bool clips_back() const { return clips() && c.keep && !q.first_order; }
  // are inner products with v and n wanted?
  bool meets() const { return c.keep && (q.grad_lr || clips_back()); }
  const T* lr(int64_t k) const { return static_cast<const T*>(q.lr) + k * c.S; }
  bool adapts(int64_t i) const { return plan.program.params[i].adapt; }

  // f(j, a) for every number j of parameter i and its step size
  template <class F>
  FASTMAML_INLINE void each(int64_t k, int64_t i, const F& f) const {
    const Slot& slot = plan.slots[i];
    const int64_t end = slot.offset + slot.size();
    if (c.element_lr()) {
      const T* const minus = c.minus_lr.get() + k * plan.P;
      for (int64_t j = slot.offset; j < end; ++j) f(j, -minus[j]);
    } else {
      const T a = lr(k)[c.S == 1 ? 0 : i];
      for (int64_t j = slot.offset; j < end; ++j) f(j, a);
    }
  }

  // <a, b> over the parameters that adapt; nothing writes what lies between their rows
  double dot(const T* a, const T* b) const {
    double total = 0;
    for (int64_t i = 0; i < c.n_params(); ++i) {
      const Slot& slot = plan.slots[i];
      for (int64_t r = 0; r < slot.rows && adapts(i); ++r)
        for (int64_t j = slot.offset + r * slot.ld, end = j + slot.cols; j < end; ++j)
          total += double(a[j]) * double(b[j]);
    }
    return total;
  }

  // c, and dc / d(|g|^2 / 2)
  struct Clip {
    T c = 1, slope = 0;
  };
  // square: |g|^2
  Clip clip(double square) const {
    const double norm = std::sqrt(std::max(square, 0.0)), scale = q.max_norm / (norm + 1e-6);
    if (scale >= 1) return {};
    return {T(scale), T(norm > 0 ? -scale / ((norm + 1e-6) * norm) : 0)};
  }

  // M_{k+1}; `to` may be m or g
  void descend(const T* w, const T* m, const T* g, T scale, T* to) const {
    for (int64_t i = 0; i < c.n_params(); ++i)
      for (int64_t j = plan.slots[i].offset, end = j + plan.slots[i].size(); j < end; ++j)
        to[j] = adapts(i) ? momentum * m[j] + scale * g[j] + weight_decay * w[j] : T(0);
  }
  void step(int64_t k, const T* w, const T* m, T* to) const {
    for (int64_t i = 0; i < c.n_params(); ++i)
      each(k, i, [&](int64_t j, T a) { to[j] = adapts(i) ? w[j] - a * m[j] : w[j]; });
  }

  // n_{k+1} in the place of n_{k+2}, and what it adds to v
  void step_back(int64_t k, T* v, T* n) const {
    for (int64_t i = 0; i < c.n_params(); ++i)
      each(k, i, [&](int64_t j, T a) {
        n[j] = adapts(i) ? momentum * n[j] - a * v[j] : T(0);
        v[j] += weight_decay * n[j];
      });
  }
  // u = e g - clipped n, with v_k = .. - H u
  void along(const T* g, const T* n, T clipped, T e, T* u) const {
    for (int64_t i = 0; i < c.n_params(); ++i)
      for (int64_t j = plan.slots[i].offset, end = j + plan.slots[i].size(); j < end; ++j)
        u[j] = adapts(i) ? -clipped * n[j] + (e == 0 ? T(0) : e * g[j]) : T(0);
  }
  // the same of plain descent: u = a_k v_{k+1}
  void along_plain(int64_t k, const T* v, T* u) const {
    for (int64_t i = 0; i < c.n_params(); ++i)
      each(k, i, [&](int64_t j, T a) { u[j] = adapts(i) ? a * v[j] : T(0); });
  }

  // dL/da_k -= v_{k+1} M_{k+1}, reduced to the shape of a_k
  void subtract_products(const T* v, const T* m, T* at) const {
    for (int64_t i = 0; i < c.n_params(); ++i) {
      const Slot& slot = plan.slots[i];
      if (!adapts(i) || (q.plain && slot.uses == 0)) continue;  // what nothing uses may still decay
      double total = 0;
      for (int64_t r = 0; r < slot.rows; ++r) {
        for (int64_t j = slot.offset + r * slot.ld, end = j + slot.cols; j < end; ++j) {
          if (c.element_lr())
            at[j] -= v[j] * m[j];
          else
            total += double(v[j]) * double(m[j]);
        }
      }
      if (!c.element_lr()) at[c.S == 1 ? 0 : i] -= T(total);
    }
  }
};

}  // namespace fastmaml::FASTMAML_ISA
