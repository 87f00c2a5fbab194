// The factored layers of a worker's tasks, of either form, and the sweeps that go through them.
#pragma once
#include "call.h"
#include "fixed_input.h"
#include "sweep.h"

namespace fastmaml::FASTMAML_ISA {

template <class T>
struct Layers {
  const Call<T>& c;
  const Plan& plan;
  std::optional<Arena> arena;
  std::vector<std::optional<FactoredLayer<T>>> factored;  // by op
  std::vector<std::optional<FixedInputLayer<T>>> fixed_input;

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
    const int64_t R = plan.program.buffers[o.op.in0].R, L = c.side_by_side;
    if (o.form == Form::factored) return L * FactoredLayer<T>::size(c.N * R, c.Q * R, c.K);
    if (o.form == Form::dense) return 0;
    return FixedInputLayer<T>::size(c.N * R, c.Q * R, plan.ld[o.op.out], c.group, L);
  }
  void make(std::size_t op, T* memory) {
    const OpPlan& o = plan.ops[op];
    const int64_t R = plan.program.buffers[o.op.in0].R;
    if (o.form == Form::factored) factored[op].emplace(o, c.thetas[op], c.N * R, c.Q * R, c.K, memory);
    if (o.form == Form::fixed_input)
      fixed_input[op].emplace(o, c.thetas[op], c.N * R, c.Q * R, plan.ld[o.op.out], c.group, c.side_by_side,
                              memory);
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

  // dL/da_k -= v_{k+1} g_k
  void add_lr_grad(const Sweep<T>& s, int64_t k, int64_t task, T* at) const {
    for (std::size_t i = plan.ops.size(); i-- > 0;) {
      const OpPlan& o = plan.ops[i];
      if (o.form == Form::dense || !plan.program.params[o.op.w].adapt) continue;
      at[c.S == 1 ? 0 : o.op.w] += T(factored[i] ? factored[i]->lr_grad(k, task, c.q.first_order)
                                                 : fixed_input[i]->lr_grad(s, k, task));
    }
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
