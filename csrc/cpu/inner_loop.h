// The whole inner loop, tail and adjoint (DESIGN: v_k = v_{k+1} - H_k (a_k v_{k+1})), for every task of a
// call.
#pragma once
#include "outer_products.h"
#include "worker.h"

namespace fastmaml::FASTMAML_ISA {

template <class T>
struct Run {
  using Products = OuterProducts<T>;
  static constexpr int64_t slice = int64_t(1) << 14;  // of sums that are added at once

  const Request& q;
  const Call<T> c{q};
  const Partition& parts = c.parts;
  const int64_t P = q.grads ? c.plan.P : 0, L = q.grad_lr ? c.K * c.lr_size() : 0, both = P + L;
  const bool sum_tasks = !q.per_task && both > 0;
  // may a thread add up the sums of its group, which are in its cache? Those of wide networks are not
  const bool by_groups = sum_tasks && !c.plan.factored && both <= slice;
  const int64_t at_once = std::min<int64_t>(q.threads, parts.sets);
  const Arena memory{(sum_tasks ? parts.sets : at_once * c.group) * both * sizeof(T)};
  T* const sums = static_cast<T*>(memory.data());
  std::vector<std::unique_ptr<Worker<T>>> workers{static_cast<std::size_t>(at_once)};

  void write(const T* sum, int64_t t) const {
    if (P) c.slots_to_flat(sum, static_cast<T*>(q.grads) + t * c.plan.program.P);
    if (L) c.write_lr_grad(sum + P, static_cast<T*>(q.grad_lr) + t * c.K * c.S);
  }

  // the part from `begin` to `end` of the sum of set i += that of set j
  void add(int64_t i, int64_t j, int64_t begin, int64_t end) const {
    for (int64_t at = begin; at < end; ++at) sums[i * both + at] += sums[j * both + at];
  }

  void run_group(int64_t round, int64_t group, int64_t worker) {
    if (!workers[worker]) workers[worker].reset(new Worker<T>(c));  // by the thread that will use it
    Worker<T>& w = *workers[worker];
    int64_t set = parts.group(round, group), t = parts.task(set);
    const int64_t last = parts.task(parts.group(round, group + 1));
    T* const own = sums + worker * c.group * both;  // the sum of each task alone
    while (t < last) {
      const int64_t some = std::min(c.group, last - t);
      for (int64_t i = 0; i < some; ++i) {
        while (t + i >= parts.task(set + 1)) ++set;
        T* const sum = sum_tasks ? sums + set * both : own + i * both;
        const bool add = sum_tasks && t + i > parts.task(set);
        if (!add) std::fill(sum + P, sum + both, T(0));
        w.sums[i] = {P ? sum : nullptr, L ? sum + P : nullptr, add};
      }
      w.run_group(t, t + some, w.sums.data());
      for (int64_t i = 0; i < some && q.per_task; ++i) write(own + i * both, t + i);
      t += some;
    }
    if (by_groups)
      in_pairs(parts.group(round, group), parts.group(round, group + 1),
               [&](int64_t i, int64_t j) { add(i, j, 0, both); });
  }

  // the gradients of the factored layers, from what the workers have run in a round
  void write_factored(int64_t round) {
    struct Item {
      const Products* of;
      int64_t o, o_size, i, i_size;
      T* out;
      bool add;
    };
    std::vector<std::unique_ptr<Products>> all;
    std::vector<Item> items;
    for (std::size_t op = 0; op < c.plan.ops.size(); ++op) {
      const OpPlan& o = c.plan.ops[op];
      if (o.form == Form::dense) continue;
      const Param& p = c.plan.program.params[o.op.w];
      auto finish = [&](int64_t row, bool add) {
        T* const out = static_cast<T*>(q.grads) + row * c.plan.program.P + p.offset;
        const Products& of = *all.back();
        for (int64_t o = 0; o < p.O; o += of.rows)
          for (int64_t i = 0; i < p.I; i += of.columns)
            items.push_back({&of, o, std::min(of.rows, p.O - o), i, std::min(of.columns, p.I - i), out, add});
      };
      // the outer products of the tasks from t to end, all of one group
      const int64_t kinds = workers[0]->layers.outer_products(op);
      auto collect = [&](int64_t j, int64_t t, int64_t end) {
        const int64_t first = t - parts.task(parts.group(round, j));
        for (int64_t kind = 0; kind < kinds; ++kind) {
          const OuterProduct<T> of = workers[j]->outer_product(op, kind, first, end - t);
          all.back()->add(of.d, c.plan.ld[o.op.out], of.x, c.plan.ld[o.op.in0], of.rows);
        }
        all.back()->close();
      };
      int64_t rows = 0;  // of a task, in all its outer products
      for (int64_t kind = 0; kind < kinds; ++kind) rows += workers[0]->outer_product(op, kind, 0, 1).rows;
      if (!q.per_task) all.emplace_back(new Products(q.T * rows, p.O, p.I));
      for (int64_t j = 0; j < parts.groups(round); ++j)
        for (int64_t set = parts.group(round, j); set < parts.group(round, j + 1); ++set) {
          const int64_t begin = parts.task(set), end = parts.task(set + 1);
          if (!q.per_task) collect(j, begin, end);
          for (int64_t t = begin; t < end && q.per_task; ++t) {
            all.emplace_back(new Products(rows, p.O, p.I));
            collect(j, t, t + 1);
            finish(t, false);
          }
        }
      if (!q.per_task) finish(0, round > 0);
    }
    const Arena scratch(q.threads * Products::scratch_size() * sizeof(T));
    parallel(items.size(), q.threads, [&](int64_t j, int worker) {
      const Item& item = items[j];
      item.of->write(item.o, item.o_size, item.i, item.i_size, item.out, item.add,
                     static_cast<T*>(scratch.data()) + worker * Products::scratch_size());
    });
  }

  void run() {
    const int64_t x_size = c.plan.program.buffers[0].R * c.plan.program.buffers[0].C;
    if (q.grad_x_s) std::memset(q.grad_x_s, 0, q.T * c.N * x_size * sizeof(T));
    if (q.grad_x_q) std::memset(q.grad_x_q, 0, q.T * c.Q * x_size * sizeof(T));
    for (int64_t round = 0; round < static_cast<int64_t>(parts.rounds.size()); ++round) {
      // what a worker has of a factored layer must last until it is written
      parallel(parts.groups(round), q.threads,
               [&](int64_t j, int worker) { run_group(round, j, c.plan.factored ? j : worker); });
      if (c.plan.factored && q.grads) write_factored(round);
    }
    if (q.total_loss) {
      double total = 0;
      for (int64_t t = 0; t < q.T; ++t) total += c.losses[t];
      *static_cast<T*>(q.total_loss) = T(total);
    }
    if (!sum_tasks) return;
    // where nets are wide the sum over sets is too long for one thread
    parallel((both + slice - 1) / slice, q.threads, [&](int64_t part, int) {
      const int64_t end = std::min((part + 1) * slice, both);
      in_pairs(0, parts.sets, [&](int64_t i, int64_t j) {
        if (!by_groups || parts.begins_group(0, j)) add(i, j, part * slice, end);
      });
    });
    write(sums, 0);
  }
};

inline void run_request(const Request& q) { q.is_double ? Run<double>{q}.run() : Run<float>{q}.run(); }

}  // namespace fastmaml::FASTMAML_ISA
