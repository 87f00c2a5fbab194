// The run of tasks: inner steps, the tail, and the way back.
#pragma once
#include "descent.h"
#include "layers.h"
#include "memory.h"

namespace fastmaml::FASTMAML_ISA {

// Where a task's gradients by params [P] and lr [K, S] go, in slots; null: not wanted. `add`: to what is
// there.
template <class T>
struct Sums {
  T *grads, *grad_lr;
  bool add;
};

// Runs a group of tasks, one after another or, where a factored layer multiplies the rows of all of them with
// its theta in every step, side by side. Nothing is allocated after the constructor.
template <class T>
struct alignas(line_pair) Worker {
  const Call<T>& c;
  const Plan& plan;
  const Request& q;
  const Descent<T> descent;
  const int64_t P, N, Q, K;
  Memory<T> memory;
  Layers<T> layers;
  T *const v, *const u, *const g, *const n;  // of all tasks
  OwnVector<Pass<T>> first, query;
  Sweep<T> s;
  OwnVector<T> c_k, slope_k, along_g;  // of clipping: [tasks, K] each, [tasks]
  OwnVector<Sums<T>> sums;             // where the caller puts those of a group
  int64_t t = 0, count = 0;            // the tasks of the sweeps now: the first, how many

  explicit Worker(const Call<T>& call)
      : c(call),
        plan(call.plan),
        q(call.q),
        descent(call),
        P(plan.P),
        N(call.N),
        Q(call.Q),
        K(call.K),
        memory(call),
        layers(call),
        v(memory.v),
        u(memory.u),
        g(memory.g),
        n(memory.n),
        sums(c.group) {
    for (auto* passes : {&first, &query, &s.tasks}) passes->reserve(c.side_by_side);
    s.first = &first, s.query = &query, s.frame = memory.frame, s.t_frame = memory.t_frame, s.K = K;
    s.query_frame = memory.q_frame, s.query_steps = c.query_steps;
    s.own_grams = descent.clips_back(), s.inner = descent.meets();
    s.grams = s.inner || q.grad_x_s;
    s.scaled = memory.scaled, s.product = memory.product;
    if (descent.clips()) c_k.resize(c.side_by_side * K), slope_k = c_k, along_g.resize(c.side_by_side);
    s.c = descent.clips() ? c_k.data() : nullptr, s.along_g = descent.clips() ? along_g.data() : nullptr;
  }

  // a sweep over all tasks side by side, after k steps on the support set
  void set_support_sweep(int64_t k) {
    s.tasks.clear();
    for (int64_t task = 0; task < count; ++task) memory.add_support_pass(s.tasks, k, task, s.offset);
    s.k = k, s.begin = 0, s.on_query = false;
  }
  // on the query set, over the tasks from `begin` to `end`
  void set_query_sweep(int64_t k, int64_t begin, int64_t end) {
    s.tasks.clear();
    for (int64_t task = begin; task < end; ++task) memory.add_query_pass(s.tasks, k, task, s.offset);
    s.k = k, s.begin = begin, s.on_query = true;
  }

  const T* lr(int64_t k) const { return descent.lr(k); }

  void set_step_size(Pass<T>& p, int64_t k) const {
    p.grad_scale = c.S == 1 ? -lr(k)[0] : T(-1);
    if (c.element_lr())
      p.scale_each = c.minus_lr.get() + k * P;
    else if (c.S != 1)
      p.scale_each_tensor = lr(k);
  }

  void inner_step(int64_t k) {
    set_support_sweep(k);
    layers.template forward<false>(s);
    for (int64_t task = 0; task < count; ++task) {
      Pass<T>& p = s.tasks[task];
      loss<false>(p, q.support, t + task);
      p.skip_frozen = true;
      p.grad_dst = q.plain ? memory.weights(k + 1, task) : g + task * P;
      if (!q.plain) continue;
      p.grad_base = p.w;
      set_step_size(p, k);
    }
    layers.template backward<false>(s);
    for (int64_t task = 0; task < count && !q.plain; ++task) {
      T* const g_t = g + task * P;
      clear_unused(g_t);
      if (descent.clips()) {
        const auto by = descent.clip(descent.dot(g_t, g_t) + layers.square(s, task));
        c_k[task * K + k] = by.c, slope_k[task * K + k] = by.slope;
      }
      descent.descend(s.tasks[task].w, memory.momenta(k, task), g_t, s.clip(task, k),
                      memory.momenta(k + 1, task));
      descent.step(k, s.tasks[task].w, memory.momenta(k + 1, task), memory.weights(k + 1, task));
    }
    for (int64_t task = 0; task < count; ++task) layers.descend(s, task);
    if (!q.plain) return;
    for (const Pass<T>& p : s.tasks)
      for (int64_t i = 0; i < c.n_params(); ++i) {  // what no gradient reaches stays as it is
        const Slot& slot = plan.slots[i];
        if (slot.uses == 0 || !plan.program.params[i].adapt)
          std::memcpy(p.grad_dst + slot.offset, p.w + slot.offset, slot.size() * sizeof(T));
      }
  }

  // g of the sweep's tasks, made anew from the kept activations; f(task, g) of each before the next one's
  template <class F>
  void gradients(const F& f) {
    for (int64_t task = 0; task < count; ++task) {
      Pass<T>& p = s.tasks[task];
      p.grad_dst = q.plain ? g : g + task * P;
      p.only_params = p.skip_frozen = true;
      for (std::size_t i = plan.ops.size(); i-- > 0;) {
        const OpPlan& o = plan.ops[i];
        if (!o.tangent_out) continue;
        if (o.form == Form::dense)
          run_op<false, false>(o, p);
        else if (p.wants_param_grad(o.op.b))
          bias_grad<false>(o, p);
      }
      if (!q.plain) clear_unused(p.grad_dst);
      f(task, p.grad_dst);
    }
  }

  // dL/da_k -= v_{k+1} M_{k+1}
  void add_lr_grad(int64_t k, int64_t task, const T* g, const Sums<T>* sums) {
    T* const at = sums[task].grad_lr + k * c.lr_size();
    layers.add_lr_grad(s, k, task, at);
    T* const m = u + task * P;
    if (!q.plain) descent.descend(s.tasks[task].w, memory.momenta(k, task), g, s.clip(task, k), m);
    descent.subtract_products(v + task * P, q.plain ? g : m, at);
  }

  // v_k, in place; or at the last step to the sums of `grads`, if there are such: true if it was
  bool adjoint_step(int64_t k, const Sums<T>* sums) {
    const bool second_order = !q.first_order && (k > 0 || q.grads || q.grad_x_s);
    if (q.grad_lr || (second_order && descent.clips())) {
      set_support_sweep(k);
      gradients([&](int64_t task, const T* g) {
        if (q.grad_lr) add_lr_grad(k, task, g, sums);
      });
    }
    for (int64_t task = 0; task < count && !q.plain; ++task) {
      T *const n_t = n + task * P, *const g_t = g + task * P;
      descent.step_back(k, v + task * P, n_t);
      layers.step_back(s, k, task);
      if (!second_order) continue;
      const T slope = descent.clips() ? slope_k[task * K + k] : T(0);
      const T e = slope == 0 ? T(0) : T(-slope * (descent.dot(g_t, n_t) + layers.along(s, k, task)));
      if (descent.clips()) along_g[task] = e;
      descent.along(g_t, n_t, s.clip(task, k), e, u + task * P);
    }
    if (!second_order) return false;
    set_support_sweep(k);
    const bool to_grads = q.grads && k == 0;
    for (int64_t task = 0; task < count; ++task) {
      Pass<T>& p = s.tasks[task];
      T* const v_t = v + task * P;
      p.x_grad = q.grad_x_s;
      p.t_w = p.grad_base = v_t;
      p.grad_dst = to_grads ? sums[task].grads : v_t;
      p.grad_add = to_grads && sums[task].add;
      if (c.scaled) {
        if (q.plain) descent.along_plain(k, v_t, u + task * P);
        p.t_w = u + task * P;
        p.grad_scale = T(-1);
      } else {
        p.grad_scale = -lr(k)[0];
      }
    }
    layers.template forward<true>(s);
    if (!plan.tangent[plan.program.output]) return false;
    for (int64_t task = 0; task < count; ++task) loss<true>(s.tasks[task], q.support, t + task);
    layers.template backward<true>(s);
    for (int64_t task = 0; task < count; ++task) {
      const Pass<T>& p = s.tasks[task];
      for (const Slot& slot : plan.slots)
        if (to_grads && slot.uses == 0)
          add_up(p.grad_dst + slot.offset, v + task * P + slot.offset, slot.size(), p.grad_add);
      if (q.grad_x_s)
        add_x_grad(p, c.scaled ? T(-1) : p.grad_scale, p.t_grad(0),
                   static_cast<T*>(q.grad_x_s) + (t + task) * N * x_size());
    }
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
    for (const Slot& slot : plan.slots)
      if (slot.uses == 0) std::memset(at + slot.offset, 0, slot.size() * sizeof(T));
  }

  // after the inner steps: the outputs of the call, and v_K
  void tail() {
    if (q.tail == Tail::weights) {
      for (int64_t task = 0; task < count; ++task) {
        const int64_t at = (t + task) * plan.program.P;
        if (q.out) c.slots_to_flat(memory.weights_at(K, task), static_cast<T*>(q.out) + at);
        if (q.seed) c.flat_to_slots(static_cast<const T*>(q.seed) + at, v + task * P);
      }
      return;
    }
    query_tails(K);
  }

  // of the weights after k steps: the last in the forward direction (v_K), the others on the way back
  void query_tails(int64_t k) {
    const double weight = q.step_weights.empty() ? 1 : q.step_weights[k - 1];
    if (weight == 0 && k < K) return;
    // Most tasks have rows enough by themselves, and stay in the cache.
    const int64_t together = std::max<int64_t>(48 / std::max<int64_t>(Q, 1), 1);
    for (int64_t begin = 0; begin < count; begin += together) {
      set_query_sweep(k, begin, std::min(begin + together, count));
      query_tail(k, weight * q.scale);
    }
  }

  void query_tail(int64_t k, double scale) {
    const int64_t b = plan.program.output;
    const Buffer& out = plan.program.buffers[b];
    const int64_t out_size = Q * out.R * out.C;
    int64_t task;  // among those side by side
    layers.template forward<false>(s);
    task = s.begin;
    for (const Pass<T>& p : s.tasks) {
      const int64_t at = (t + task) * out_size;
      if (q.tail == Tail::output) {
        if (q.out) copy_rows(p.rows(b), out.C, p.value(b), p.ld(b), static_cast<T*>(q.out) + at, out.C);
        if (q.seed)
          copy_rows(p.rows(b), out.C, static_cast<const T*>(q.seed) + at, out.C, p.grad(b), p.ld(b));
      } else {
        const double value = scale * loss<false>(p, q.query, t + task);
        if (q.loss) static_cast<T*>(q.loss)[t + task] += T(value);
        if (q.total_loss) c.losses[t + task] += value;
      }
      ++task;
    }
    if (!c.adjoint && !q.grad_x_q) return;
    task = s.begin;
    for (Pass<T>& p : s.tasks) {
      p.x_grad = q.grad_x_q;
      p.grad_dst = v + task * P;
      if (k < K) p.grad_base = p.grad_dst;
      p.grad_scale = T(scale);  // and with it all that comes after, which is linear in v
      if (q.tail == Tail::curvature)
        p.grad_scale = q.grad_loss ? static_cast<const T*>(q.grad_loss)[t + task] : T(0);
      if (plan.factored) {  // the rows of d are part of v: they take the factor, and factored.h's sign
        for (int64_t i = 0; i < p.rows(b) * p.ld(b); ++i) p.grad(b)[i] *= -p.grad_scale;
        p.grad_scale = T(-1);
      }
      if (k == K) clear_unused(p.grad_dst);
      ++task;
    }
    layers.template backward<false>(s);
    add_x_q_grad(s.tasks[0].grad_scale, false);
    if (q.tail != Tail::curvature || !plan.tangent[b]) return;
    task = s.begin;
    for (Pass<T>& p : s.tasks) {
      c.flat_to_slots(static_cast<const T*>(q.seed) + (t + task) * plan.program.P, u + task * P);
      p.t_w = u + task * P;
      p.grad_base = v + task * P;
      p.grad_scale = 1;
      ++task;
    }
    layers.template forward<true>(s);
    task = s.begin;
    for (const Pass<T>& p : s.tasks) loss<true>(p, q.query, t + task++);
    layers.template backward<true>(s);
    add_x_q_grad(T(1), true);
  }
  void add_x_q_grad(T scale, bool tangent) const {
    T* out = static_cast<T*>(q.grad_x_q);
    if (out) out += (t + s.begin) * Q * x_size();
    for (std::size_t i = 0; i < s.tasks.size() && out; ++i, out += Q * x_size())
      add_x_grad(s.tasks[i], scale, tangent ? s.tasks[i].t_grad(0) : s.tasks[i].grad(0), out);
  }

  // the tasks `begin` to `end`, at most `group` of them; sums: for each
  void run_group(int64_t begin, int64_t end, const Sums<T>* sums) {
    const int64_t tasks = end - begin;
    memory.take_x(begin, tasks);
    layers.multiply(tasks, memory.x_s, memory.x_q);
    for (s.offset = 0; s.offset < tasks; s.offset += c.side_by_side) {
      t = begin + s.offset, count = std::min(c.side_by_side, tasks - s.offset);
      run_tasks(sums + s.offset);
    }
  }

  void run_tasks(const Sums<T>* sums) {
    for (int64_t task = 0; task < count && c.any_own; ++task) {
      T* const own = memory.theta_own + task * P;
      std::memcpy(own, c.theta.get(), P * sizeof(T));
      for (std::size_t i = 0; i < q.params.size(); ++i) {
        const Param& p = plan.program.params[i];
        if (q.own[i])
          to_slot(plan.slots[i], static_cast<const T*>(q.params[i]) + (t + task) * p.O * p.I,
                  own + plan.slots[i].offset);
      }
    }
    if (plan.factored) {
      first.clear(), query.clear();
      for (int64_t task = 0; task < count; ++task) {
        memory.add_support_pass(first, 0, task, s.offset);
        memory.add_query_pass(query, c.query_steps[0], task, s.offset);
        layers.begin(task, first[task].x, query[task].x);
      }
    }
    for (int64_t task = 0; task < count && !q.plain && K > 0; ++task) {
      std::memset(memory.momenta(0, task), 0, P * sizeof(T));
      std::memset(n + task * P, 0, P * sizeof(T));
    }
    for (int64_t task = 0; task < count; ++task) {
      if (q.loss) static_cast<T*>(q.loss)[t + task] = 0;
      if (q.total_loss) c.losses[t + task] = 0;
    }
    const bool at_steps = !q.step_weights.empty();
    for (int64_t k = 0; k < K; ++k) {
      inner_step(k);
      if (at_steps && !c.keep && k + 1 < K) query_tails(k + 1);
    }
    tail();
    if (!c.adjoint) return;
    bool added = false;
    for (int64_t k = K - 1; k >= 0 && c.keep; --k) {
      if ((k + 1) % c.every == 0 && k + 1 < K)  // a segment whose activations were written over
        for (int64_t j = k + 1 - c.every; j <= k; ++j) inner_step(j);
      added = adjoint_step(k, sums);
      if (!at_steps || k == 0) continue;
      for (int64_t task = 0; task < count; ++task) layers.rewind(s, k, task);
      query_tails(k);
    }
    for (int64_t task = 0; task < count && q.grads; ++task) layers.finish(s, task);
    for (int64_t task = 0; task < count && q.grads && !added; ++task)
      add_up(sums[task].grads, v + task * P, P, sums[task].add);
  }

  OuterProduct<T> outer_product(std::size_t op, int64_t kind, int64_t task, int64_t tasks) const {
    return layers.outer_product(s, op, kind, task, tasks, memory.x_s, memory.x_q);
  }
};

}  // namespace fastmaml::FASTMAML_ISA
