// The whole inner loop, tail and adjoint of a task (DESIGN: v_k = v_{k+1} - H_k (a_k v_{k+1})), for every
// task of a call.
#pragma once
#include <memory>
#include <optional>

#include "add.h"
#include "arena.h"
#include "batch_norm.h"
#include "cross_entropy.h"
#include "flatten.h"
#include "gelu.h"
#include "layer_norm.h"
#include "leaky_relu.h"
#include "linear.h"
#include "mse.h"
#include "request.h"
#include "sigmoid.h"
#include "silu.h"
#include "tanh.h"
#include "thread_pool.h"

namespace fastmaml::FASTMAML_ISA {

// f(forward or backward of the op's kind): the one list of ops
template <bool Dual, bool Forward, class T>
void run_op(const OpPlan& o, const Pass<T>& p) {
  auto elementwise = [&](const auto& f) {
    Forward ? elementwise_forward<Dual>(o, p, f) : elementwise_backward<Dual>(o, p, f);
  };
  switch (o.op.kind) {
    case Kind::linear:
      return Forward ? linear_forward<Dual>(o, p) : linear_backward<Dual>(o, p);
    case Kind::batch_norm:
      return Forward ? batch_norm_forward<Dual>(o, p) : batch_norm_backward<Dual>(o, p);
    case Kind::layer_norm:
      return Forward ? layer_norm_forward<Dual>(o, p) : layer_norm_backward<Dual>(o, p);
    case Kind::leaky_relu:
      return elementwise(LeakyRelu<T>{T(o.op.attr)});
    case Kind::tanh:
      return elementwise(Tanh<T>{});
    case Kind::sigmoid:
      return elementwise(Sigmoid<T>{});
    case Kind::gelu:
      return o.op.attr ? elementwise(GeluTanh<T>{}) : elementwise(Gelu<T>{});
    case Kind::silu:
      return elementwise(Silu<T>{});
    case Kind::add:
      return Forward ? add_forward<Dual>(o, p) : add_backward<Dual>(o, p);
    case Kind::flatten:
      return Forward ? flatten_forward<Dual>(o, p) : flatten_backward<Dual>(o, p);
  }
}

// An op that no parameter precedes has no tangent, and no gradient unless that of x is wanted.
template <bool Dual, class T>
void forward(const Pass<T>& p) {
  for (const OpPlan& o : p.plan.ops)
    if (!Dual || o.tangent_out) run_op<Dual, true>(o, p);
}

template <bool Dual, class T>
void backward(const Pass<T>& p) {
  for (auto o = p.plan.ops.rbegin(); o != p.plan.ops.rend(); ++o)
    if (o->tangent_out || p.x_grad) run_op<Dual, false>(*o, p);
}

template <bool Dual, class T>
double loss(const Pass<T>& p, const Set& set, int64_t t) {
  const Buffer& b = p.plan.program.buffers[p.plan.program.output];
  const T* weight = set.weight ? static_cast<const T*>(set.weight) + t * set.n : nullptr;
  if (p.plan.program.loss == Loss::mse)
    return mse<Dual>(p, static_cast<const T*>(set.target) + t * set.n * b.R * b.C, weight);
  return cross_entropy<Dual>(p, static_cast<const int64_t*>(set.target) + t * set.n, weight);
}

// rows of C numbers to rows of ld numbers and back
template <class T>
void copy_rows(int64_t rows, int64_t C, const T* from, int64_t ld_from, T* to, int64_t ld_to) {
  for (int64_t r = 0; r < rows; ++r) std::memcpy(to + r * ld_to, from + r * ld_from, C * sizeof(T));
}

// f(r, c) in an order that suits a transpose
template <class F>
FASTMAML_INLINE void in_tiles(int64_t rows, int64_t cols, const F& f) {
  for (int64_t r0 = 0; r0 < rows; r0 += 16)
    for (int64_t c0 = 0; c0 < cols; c0 += 16)
      for (int64_t r = r0; r < std::min(r0 + 16, rows); ++r)
        for (int64_t c = c0; c < std::min(c0 + 16, cols); ++c) f(r, c);
}

// torch's [O, I] to the slot's layout, padded with zeros
template <class T>
void to_slot(const Slot& s, const T* from, T* to) {
  for (int64_t r = 0; s.cols < s.ld && r < s.rows; ++r)
    std::memset(to + r * s.ld + s.cols, 0, (s.ld - s.cols) * sizeof(T));
  if (s.wide)
    in_tiles(s.rows, s.cols, [&](int64_t r, int64_t c) { to[r * s.ld + c] = from[c * s.rows + r]; });
  else
    copy_rows(s.rows, s.cols, from, s.cols, to, s.ld);
}

template <class T>
void from_slot(const Slot& s, const T* from, T* to) {
  if (s.wide)
    in_tiles(s.rows, s.cols, [&](int64_t r, int64_t c) { to[c * s.rows + r] = from[r * s.ld + c]; });
  else
    copy_rows(s.rows, s.cols, from, s.ld, to, s.cols);
}

// What all tasks of a call share.
template <class T>
struct Call {
  const Request& q;
  Plan plan;
  int64_t N, Q, K, S, every;  // every: steps between two stored W_k
  bool adjoint, keep;         // is there a sweep back; are the steps' activations and weights kept for it
  bool scaled;  // is the tangent a_k v a copy, because a_k is not one number or v changes while it is read
  bool any_own = false;
  std::unique_ptr<T[]> theta;        // in slots, where shared by the tasks
  std::unique_ptr<T[]> minus_lr;     // [K, P] in slots: -a, where it has a number for each element
  std::unique_ptr<double[]> losses;  // [T], where their sum is wanted

  explicit Call(const Request& request)
      : q(request),
        plan(make_plan(*request.program, lanes<T>, 64 / sizeof(T))),
        N(q.support.n),
        Q(q.query.n),
        K(q.K),
        S(q.S) {
    every = q.checkpoint_every > 0 && q.checkpoint_every < K ? q.checkpoint_every : std::max<int64_t>(K, 1);
    adjoint = q.grads || q.grad_lr || q.grad_x_s;
    const bool second_order = !q.first_order && (q.grads || q.grad_x_s || (q.grad_lr && K > 1));
    keep = adjoint && K > 0 && (second_order || q.grad_lr);
    scaled = S != 1 || plan.frozen || plan.tied;
    for (char own : q.own) any_own |= own != 0;
    if (q.total_loss) losses.reset(new double[q.T]);
    theta.reset(new T[plan.P]());
    for (std::size_t i = 0; i < q.params.size(); ++i)
      if (!q.own[i])
        to_slot(plan.slots[i], static_cast<const T*>(q.params[i]), theta.get() + plan.slots[i].offset);
    if (element_lr()) {
      minus_lr.reset(new T[K * plan.P]());
      for (int64_t k = 0; k < K; ++k)
        flat_to_slots(static_cast<const T*>(q.lr) + k * S, minus_lr.get() + k * plan.P);
      for (int64_t i = 0; i < K * plan.P; ++i) minus_lr[i] = -minus_lr[i];
    }
  }

  int64_t n_params() const { return plan.slots.size(); }
  bool element_lr() const { return K > 0 && S != 1 && S != n_params(); }
  int64_t lr_size() const { return element_lr() ? plan.P : S; }  // of one step's gradient, inside

  void flat_to_slots(const T* flat, T* slots) const {
    for (int64_t i = 0; i < n_params(); ++i)
      to_slot(plan.slots[i], flat + plan.program.params[i].offset, slots + plan.slots[i].offset);
  }
  void slots_to_flat(const T* slots, T* flat) const {
    std::memset(flat, 0, plan.program.P * sizeof(T));
    for (int64_t i = 0; i < n_params(); ++i)
      from_slot(plan.slots[i], slots + plan.slots[i].offset, flat + plan.program.params[i].offset);
  }
  void write_lr_grad(const T* inside, T* out) const {
    for (int64_t k = 0; k < K; ++k) {
      if (element_lr())
        slots_to_flat(inside + k * plan.P, out + k * S);
      else
        std::memcpy(out + k * S, inside + k * S, S * sizeof(T));
    }
  }
};

// A worker's memory and the run of one task in it. Nothing is allocated after the constructor.
template <class T>
struct Worker {
  const Call<T>& c;
  const Plan& plan;
  const Request& q;
  const int64_t P, N, Q, K;
  std::optional<Arena> arena;
  T *theta_own, *stored, *segment, *v, *u, *g, *x_s, *x_q, *support_frames;
  Frame<T> query_frame, tangent_frame;
  int64_t frame, clear = 0;  // floats of a support frame; floats that start as zeros
  const T* theta = nullptr;

  explicit Worker(const Call<T>& call)
      : c(call), plan(call.plan), q(call.q), P(plan.P), N(call.N), Q(call.Q), K(call.K) {
    const int64_t ld0 = plan.ld[0] * plan.program.buffers[0].R, steps = c.keep ? c.every : 1;
    frame = plan.frame_size(N);
    const bool dual = c.keep || q.tail == Tail::curvature;
    // frames first: they must start as zeros, for the padding
    const int64_t sizes[] = {K > 0 ? steps * frame : 0,
                             plan.frame_size(Q),
                             dual ? plan.frame_size(std::max(N, Q)) : 0,
                             K > 0 ? N * ld0 : 0,
                             Q * ld0,
                             P,
                             (c.keep ? (K + c.every - 1) / c.every + 1 : 2) * P,
                             c.keep ? (c.every - 1) * P : 0,
                             P,
                             P,
                             P};
    int64_t total = 0;
    for (int i = 0; i < 11; ++i) {
      total += round_up(sizes[i], 16);
      if (i == 4) clear = total;
    }
    arena.emplace(total * sizeof(T));
    T* at = static_cast<T*>(arena->data());
    int i = 0;
    auto take = [&] { return std::exchange(at, at + round_up(sizes[i++], 16)); };
    support_frames = take();
    query_frame = carve_frame(plan, Q, take());
    tangent_frame.value = take();
    x_s = take(), x_q = take();
    theta_own = take(), stored = take(), segment = take(), v = take(), u = take(), g = take();
  }

  // the padding of the frames must be zero
  void prepare() { std::memset(arena->data(), 0, std::exchange(clear, 0) * sizeof(T)); }

  // W_k: stored at every `every`-th step, in the current segment else. Without an adjoint two take turns.
  T* weights(int64_t k) const {
    if (!c.keep) return stored + (k & 1) * P;
    return k % c.every == 0 ? stored + k / c.every * P : segment + (k % c.every - 1) * P;
  }
  const T* weights_at(int64_t k) const { return k == 0 ? theta : weights(k); }

  Pass<T> support_pass(int64_t k) const {
    return {plan,
            N,
            x_s,
            carve_frame(plan, N, support_frames + (c.keep ? k % c.every : 0) * frame),
            carve_frame(plan, N, tangent_frame.value),
            weights_at(k)};
  }
  Pass<T> query_pass() const {
    return {plan, Q, x_q, query_frame, carve_frame(plan, Q, tangent_frame.value), weights_at(K)};
  }

  const T* lr(int64_t k) const { return static_cast<const T*>(q.lr) + k * c.S; }

  void set_step_size(Pass<T>& p, int64_t k) const {
    p.grad_scale = c.S == 1 ? -lr(k)[0] : T(-1);
    if (c.element_lr())
      p.scale_each = c.minus_lr.get() + k * P;
    else if (c.S != 1)
      p.scale_each_tensor = lr(k);
  }

  void inner_step(int64_t k, int64_t t) const {
    Pass<T> p = support_pass(k);
    T* next = weights(k + 1);
    forward<false>(p);
    loss<false>(p, q.support, t);
    p.skip_frozen = true;
    p.grad_dst = next;
    p.grad_base = p.w;
    set_step_size(p, k);
    backward<false>(p);
    for (int64_t i = 0; i < c.n_params(); ++i) {  // what no gradient reaches stays as it is
      const Slot& s = plan.slots[i];
      if (s.uses == 0 || !plan.program.params[i].adapt)
        std::memcpy(next + s.offset, p.w + s.offset, s.size() * sizeof(T));
    }
  }

  // u = a_k v, 0 for what is frozen
  void scale_tangent(int64_t k) const {
    for (int64_t i = 0; i < c.n_params(); ++i) {
      const Slot& s = plan.slots[i];
      const T* each = c.element_lr() ? c.minus_lr.get() + k * P + s.offset : nullptr;
      const T a = !plan.program.params[i].adapt ? T(0) : each ? T(-1) : lr(k)[c.S == 1 ? 0 : i];
      for (int64_t j = 0; j < s.size(); ++j) u[s.offset + j] = (each ? a * each[j] : a) * v[s.offset + j];
    }
  }

  // dL/da_k -= v_{k+1} g_k, reduced to the shape of a_k; g is made anew from the kept activations
  void add_lr_grad(int64_t k, T* grad_lr) const {
    Pass<T> p = support_pass(k);
    p.grad_dst = g;
    p.only_params = p.skip_frozen = true;
    backward<false>(p);
    T* at = grad_lr + k * c.lr_size();
    for (int64_t i = 0; i < c.n_params(); ++i) {
      const Slot& s = plan.slots[i];
      if (s.uses == 0 || !plan.program.params[i].adapt) continue;
      double total = 0;
      for (int64_t r = 0; r < s.rows; ++r) {
        for (int64_t j = s.offset + r * s.ld, end = j + s.cols; j < end; ++j) {
          if (c.element_lr())
            at[j] -= v[j] * g[j];
          else
            total += double(v[j]) * double(g[j]);
        }
      }
      if (!c.element_lr()) at[c.S == 1 ? 0 : i] -= T(total);
    }
  }

  // v_k, in place; or at the last step to `grads`, if there are such, written or added: true if it was
  bool adjoint_step(int64_t k, int64_t t, T* grad_lr, T* grads, bool add) const {
    if (grad_lr) add_lr_grad(k, grad_lr);
    if (q.first_order || (k == 0 && !q.grads && !q.grad_x_s)) return false;
    Pass<T> p = support_pass(k);
    p.x_grad = q.grad_x_s;
    p.t_w = v;
    const bool to_grads = grads && k == 0;
    p.grad_dst = to_grads ? grads : v;
    p.grad_add = to_grads && add;
    p.grad_base = v;
    if (c.scaled) {
      scale_tangent(k);
      p.t_w = u;
      p.grad_scale = T(-1);
    } else {
      p.grad_scale = -lr(k)[0];
    }
    forward<true>(p);
    if (!plan.tangent[plan.program.output]) return false;
    loss<true>(p, q.support, t);
    backward<true>(p);
    for (const Slot& s : plan.slots)
      if (to_grads && s.uses == 0) add_up(grads + s.offset, v + s.offset, s.size(), add);
    if (q.grad_x_s)
      add_x_grad(p, c.scaled ? T(-1) : p.grad_scale, p.t_grad(0),
                 static_cast<T*>(q.grad_x_s) + t * N * x_size());
    return to_grads;
  }

  static void add_up(T* sum, const T* part, int64_t n, bool add) {
    for (int64_t i = 0; i < n; ++i) sum[i] = add ? sum[i] + part[i] : part[i];
  }

  int64_t x_size() const { return plan.program.buffers[0].R * plan.program.buffers[0].C; }

  void add_x_grad(const Pass<T>& p, T scale, const T* d, T* out) const {
    const int64_t C = plan.program.buffers[0].C;
    for (int64_t r = 0; r < p.rows(0); ++r)
      for (int64_t i = 0; i < C; ++i) out[r * C + i] += scale * d[r * p.ld(0) + i];
  }

  void clear_unused(T* at) const {
    for (const Slot& s : plan.slots)
      if (s.uses == 0) std::memset(at + s.offset, 0, s.size() * sizeof(T));
  }

  // after the inner steps: the outputs of the call, and v_K
  void tail(int64_t t) const {
    const Buffer& out = plan.program.buffers[plan.program.output];
    const int64_t out_size = Q * out.R * out.C;
    if (q.tail == Tail::weights) {
      if (q.out) c.slots_to_flat(weights_at(K), static_cast<T*>(q.out) + t * plan.program.P);
      if (q.seed) c.flat_to_slots(static_cast<const T*>(q.seed) + t * plan.program.P, v);
      return;
    }
    Pass<T> p = query_pass();
    forward<false>(p);
    if (q.tail == Tail::output) {
      const int64_t b = plan.program.output;
      if (q.out)
        copy_rows(p.rows(b), out.C, p.value(b), p.ld(b), static_cast<T*>(q.out) + t * out_size, out.C);
      if (q.seed)
        copy_rows(p.rows(b), out.C, static_cast<const T*>(q.seed) + t * out_size, out.C, p.grad(b), p.ld(b));
    } else {
      const double value = loss<false>(p, q.query, t);
      if (q.loss) static_cast<T*>(q.loss)[t] = T(q.scale * value);
      if (q.total_loss) c.losses[t] = q.scale * value;
    }
    if (!c.adjoint && !q.grad_x_q) return;
    p.x_grad = q.grad_x_q;
    p.grad_dst = v;
    p.grad_scale = T(q.scale);  // and with it all that comes after, which is linear in v
    if (q.tail == Tail::curvature) p.grad_scale = q.grad_loss ? static_cast<const T*>(q.grad_loss)[t] : T(0);
    clear_unused(v);
    backward<false>(p);
    T* x_out = q.grad_x_q ? static_cast<T*>(q.grad_x_q) + t * Q * x_size() : nullptr;
    if (x_out) add_x_grad(p, p.grad_scale, p.grad(0), x_out);
    if (q.tail != Tail::curvature || !plan.tangent[plan.program.output]) return;
    c.flat_to_slots(static_cast<const T*>(q.seed) + t * plan.program.P, u);
    p.t_w = u;
    p.grad_base = v;
    p.grad_scale = 1;
    forward<true>(p);
    loss<true>(p, q.query, t);
    backward<true>(p);
    if (x_out) add_x_grad(p, T(1), p.t_grad(0), x_out);
  }

  // grads [P] (written if `first`, else added to) and grad_lr [K, S] (added to) are in slots
  void run_task(int64_t t, bool first, T* grads, T* grad_lr) {
    theta = c.theta.get();
    if (c.any_own) {
      std::memcpy(theta_own, theta, P * sizeof(T));
      for (std::size_t i = 0; i < q.params.size(); ++i) {
        const Param& p = plan.program.params[i];
        if (q.own[i])
          to_slot(plan.slots[i], static_cast<const T*>(q.params[i]) + t * p.O * p.I,
                  theta_own + plan.slots[i].offset);
      }
      theta = theta_own;
    }
    const Buffer& x = plan.program.buffers[0];
    if (K > 0)
      copy_rows(N * x.R, x.C, static_cast<const T*>(q.support.x) + t * N * x_size(), x.C, x_s, plan.ld[0]);
    if (q.tail != Tail::weights)
      copy_rows(Q * x.R, x.C, static_cast<const T*>(q.query.x) + t * Q * x_size(), x.C, x_q, plan.ld[0]);

    for (int64_t k = 0; k < K; ++k) inner_step(k, t);
    tail(t);
    if (!c.adjoint) return;
    bool added = false;
    for (int64_t k = K - 1; k >= 0 && c.keep; --k) {
      if ((k + 1) % c.every == 0 && k + 1 < K)  // a segment whose activations were written over
        for (int64_t j = k + 1 - c.every; j <= k; ++j) inner_step(j, t);
      added = adjoint_step(k, t, grad_lr, grads, !first);
    }
    if (grads && !added) add_up(grads, v, P, !first);
  }
};

// Tasks are run in groups, each with sums of its own, so that the result does not depend on the number of
// threads.
template <class T>
void run_call(const Request& q) {
  const Call<T> c(q);
  const int64_t P = q.grads ? c.plan.P : 0, L = q.grad_lr ? c.K * c.lr_size() : 0, both = P + L;
  const bool sum_tasks = !q.per_task && both > 0;
  const int64_t groups =
      sum_tasks ? std::min(q.T, std::clamp<int64_t>((int64_t(1) << 22) / both, 8, 64)) : q.T;
  const Arena memory((sum_tasks ? groups : q.threads) * both * sizeof(T));
  T* const sums = static_cast<T*>(memory.data());
  const int64_t x_size = c.plan.program.buffers[0].R * c.plan.program.buffers[0].C;
  if (q.grad_x_s) std::memset(q.grad_x_s, 0, q.T * c.N * x_size * sizeof(T));
  if (q.grad_x_q) std::memset(q.grad_x_q, 0, q.T * c.Q * x_size * sizeof(T));
  auto write = [&](const T* sum, int64_t t) {
    if (P) c.slots_to_flat(sum, static_cast<T*>(q.grads) + t * c.plan.program.P);
    if (L) c.write_lr_grad(sum + P, static_cast<T*>(q.grad_lr) + t * c.K * c.S);
  };
  std::vector<std::unique_ptr<Worker<T>>> workers;
  for (int i = 0; i < std::min<int64_t>(q.threads, groups); ++i) workers.emplace_back(new Worker<T>(c));
  parallel(groups, q.threads, [&](int64_t j, int worker) {
    workers[worker]->prepare();
    T* sum = sums + (sum_tasks ? j : worker) * both;
    std::fill(sum + P, sum + both, T(0));
    const int64_t begin = q.T * j / groups, end = q.T * (j + 1) / groups;
    for (int64_t t = begin; t < end; ++t)
      workers[worker]->run_task(t, t == begin, P ? sum : nullptr, L ? sum + P : nullptr);
    if (q.per_task) write(sum, j);
  });
  if (q.total_loss) {
    double total = 0;
    for (int64_t t = 0; t < q.T; ++t) total += c.losses[t];
    *static_cast<T*>(q.total_loss) = T(total);
  }
  if (!sum_tasks) return;
  // where nets are wide the sum over groups is too long for one thread
  const int64_t slice = int64_t(1) << 14;
  parallel((both + slice - 1) / slice, q.threads, [&](int64_t part, int) {
    const int64_t end = std::min((part + 1) * slice, both);
    for (int64_t j = 1; j < groups; ++j)
      for (int64_t i = part * slice; i < end; ++i) sums[i] += sums[j * both + i];
  });
  write(sums, 0);
}

inline void run_request(const Request& q) { q.is_double ? run_call<double>(q) : run_call<float>(q); }

}  // namespace fastmaml::FASTMAML_ISA
