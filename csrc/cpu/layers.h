// The factored layers of a worker's tasks, of either form, and the sweeps that go through them.
#pragma once
#include "descent.h"
#include "fixed_input.h"
#include "sweep.h"

namespace fastmaml::FASTMAML_ISA {

template <class T>
struct Layers {
  const Call<T>& c;
  const Plan& plan;
  std::optional<Arena> arena;
  OwnVector<std::optional<FactoredLayer<T>>> factored;  // by op
  OwnVector<std::optional<FixedInputLayer<T>>> fixed_input;

  explicit Layers(const Call<T>& call)
      : c(call), plan(call.plan), factored(plan.ops.size()), fixed_input(plan.ops.size()) {
    if (!plan.factored) return;
    int64_t total = 0;
    for (std::size_t op = 0; op < plan.ops.size(); ++op) total += round_up(size(op), 16);
    arena.emplace(total * sizeof(T));
    T* at = static_cast<T*>(arena->data());
    for (std::size_t op = 0; op < plan.ops.size(); ++op)
      make(op, std::exchange(at, at + round_up(size(op), 16)));
  }

  int64_t size(std::size_t op) const {
    const OpPlan& o = plan.ops[op];
    const int64_t R = plan.program.buffers[o.op.in0].R, L = c.side_by_side, B = c.query_steps.size();
    if (o.form == Form::dense) return 0;
    // a vector more, for loads that begin at the last block of the last Gram
    if (o.form == Form::factored) return L * FactoredLayer<T>::size(c.N * R, c.Q * R, c.K, B) + lanes<T>;
    return FixedInputLayer<T>::size(c.N * R, c.Q * R, plan.ld[o.op.out], c.group, L, c.q.plain, once());
  }
  // the products of x with theta are read before there is a v, and no more after it
  bool once() const { return c.q.plain && c.q.step_weights.empty(); }
  void make(std::size_t op, T* memory) {
    const OpPlan& o = plan.ops[op];
    const int64_t R = plan.program.buffers[o.op.in0].R;
    if (o.form == Form::factored)
      factored[op].emplace(o, c.thetas[op], c.N * R, c.Q * R, c.K, c.query_steps.size(),
                           Descent<T>(c).meets() ? c.side_by_side : 0, memory);
    if (o.form == Form::fixed_input)
      fixed_input[op].emplace(o, c.thetas[op], c.N * R, c.Q * R, plan.ld[o.op.out], c.group, c.side_by_side,
                              c.q.plain, once(), Descent<T>(c).clips(), memory);
  }

  // For the tasks of a group, whose x are rows of two matrices.
  void multiply(int64_t tasks, const T* x_s, const T* x_q) {
    for (auto& layer : fixed_input)
      if (layer) layer->multiply(tasks, x_s, x_q, plan.ld[0]);
  }
  void begin(int64_t task, const T* x_s, const T* x_q) {
    for (auto& layer : fixed_input)
      if (layer) layer->begin(task, x_s, x_q, plan.ld[0]);
  }

  // An op that no parameter precedes has no tangent, and no gradient unless that of x is wanted.
  template <bool Dual>
  void forward(const Sweep<T>& s) {
    for (std::size_t i = 0; i < plan.ops.size(); ++i)
      if (!Dual || plan.ops[i].tangent_out) run_op_of_all<Dual, true>(i, s);
  }
  template <bool Dual>
  void backward(const Sweep<T>& s) {
    for (std::size_t i = plan.ops.size(); i-- > 0;)
      if (plan.ops[i].tangent_out || s.tasks[0].x_grad) run_op_of_all<Dual, false>(i, s);
  }
  template <bool Dual, bool Forward>
  void run_op_of_all(std::size_t i, const Sweep<T>& s) {
    const OpPlan& o = plan.ops[i];
    if (o.form == Form::factored)
      Forward ? factored[i]->template forward<Dual>(s) : factored[i]->template backward<Dual>(s);
    else if (o.form == Form::fixed_input)
      Forward ? fixed_input[i]->template forward<Dual>(s) : fixed_input[i]->template backward<Dual>(s);
    else
      for (const Pass<T>& p : s.tasks) run_op<Dual, Forward>(o, p);
  }

  // f(layer, op) for those whose weight adapts
  template <class F>
  void each(const F& f) {
    for (std::size_t i = plan.ops.size(); i-- > 0;) {
      if (plan.ops[i].form == Form::dense || !plan.program.params[plan.ops[i].op.w].adapt) continue;
      if (factored[i])
        f(*factored[i], plan.ops[i].op);
      else
        f(*fixed_input[i], plan.ops[i].op);
    }
  }
  template <class F>
  void each_fixed_input(const F& f) {
    for (auto& layer : fixed_input)
      if (layer) f(*layer);
  }

  // dL/da_k -= v_{k+1} M_{k+1}
  void add_lr_grad(const Sweep<T>& s, int64_t k, int64_t task, T* at) {
    each([&](auto& layer, const Op& op) {
      at[c.S == 1 ? 0 : op.w] += T(layer.lr_grad(s, k, task, c.q.first_order));
    });
  }
  // |g_k|^2 and <g_k, n_{k+1}>
  double square(const Sweep<T>& s, int64_t task) {
    double total = 0;
    each([&](auto& layer, const Op&) { total += layer.square(s, task); });
    return total;
  }
  double along(const Sweep<T>& s, int64_t k, int64_t task) {
    double total = 0;
    each([&](auto& layer, const Op&) { total += layer.along(s, k, task); });
    return total;
  }
  void descend(const Sweep<T>& s, int64_t task) {
    each_fixed_input([&](auto& layer) { layer.descend(s, task); });
  }
  void rewind(const Sweep<T>& s, int64_t k, int64_t task) {
    each_fixed_input([&](auto& layer) { layer.rewind(s, k, task); });
  }
  void step_back(const Sweep<T>& s, int64_t k, int64_t task) {
    each_fixed_input([&](auto& layer) { layer.step_back(s, k, task); });
  }
  void finish(const Sweep<T>& s, int64_t task) {
    for (auto& layer : factored)
      if (layer && layer->by.decays()) layer->finish(s, task, !c.keep || c.q.first_order);
  }

  // How many there are in the gradient of a factored weight, and one of them times -1: of `tasks` tasks from
  // `task` on.
  int64_t outer_products(std::size_t op) const {
    const bool first_order = !c.keep || c.q.first_order;
    return factored[op] ? factored[op]->outer_products(first_order) : first_order ? 1 : 2;
  }
  OuterProduct<T> outer_product(const Sweep<T>& s, std::size_t op, int64_t kind, int64_t task, int64_t tasks,
                                const T* x_s, const T* x_q) const {
    if (factored[op]) return factored[op]->outer_product(s, kind, task, tasks);
    return fixed_input[op]->outer_product(kind, task, tasks, kind == 0 ? x_q : x_s, plan.ld[0]);
  }
};

}  // namespace fastmaml::FASTMAML_ISA
