// The whole inner loop, tail and adjoint (DESIGN: v_k = v_{k+1} - H_k (a_k v_{k+1})), for every task of a
// call.
#pragma once
#include "worker.h"

namespace fastmaml::FASTMAML_ISA {

// The gradient of a factored layer's theta [O, I]: minus the sum of its outer products d^T x.
template <class T>
struct OuterProducts {
  // The block of it that is made at once, and how many rows of d and x are multiplied before the next: d's
  // part is packed, x's stays in L2 while the block's rows go over it, and is read again for as few blocks as
  // can be.
  static constexpr int64_t rows = 96, columns = 512, most = 256;

  int64_t I;
  std::vector<Factors<T>> products = {};
  std::vector<int64_t> ends = {};  // of the products done at once
  int64_t filled = 0;

  // what is added between two calls of close() is summed in an order of its own
  void add(const T* d, int64_t ldd, const T* x, int64_t ldx, int64_t n) {
    for (int64_t r = 0; r < n;) {
      const int64_t some = std::min(n - r, most - filled);
      products.push_back({d + r * ldd, 1, ldd, x + r * ldx, ldx, some});
      r += some, filled += some;
      if (filled == most) close();
    }
  }
  void close() {
    if ((ends.empty() ? 0 : ends.back()) < static_cast<int64_t>(products.size()))
      ends.push_back(products.size());
    filled = 0;
  }

  static constexpr int64_t scratch_size = (rows + most) * columns + most * rows;

  // its `o_size` rows from o on and `i_size` columns from i on
  void write(int64_t o, int64_t o_size, int64_t i, int64_t i_size, T* out, bool add, T* scratch) const {
    T *const sum = scratch, *const packed = scratch + rows * columns;
    for (int64_t r = 0; r < o_size && add; ++r)  // goes on from the round before
      for (int64_t c = 0; c < columns; ++c)
        sum[r * columns + c] = c < i_size ? -out[(o + r) * I + i + c] : T(0);
    T* const packed_x = packed + most * rows;
    int64_t begin = 0;
    for (const int64_t end : ends) {
      T* at = packed;
      int64_t depth = 0;
      for (int64_t j = begin; j < end; ++j) {
        const Factors<T>& p = products[j];
        for (int64_t r = 0; r < p.K; ++r, at += rows)
          std::memcpy(at, p.a + r * p.a_col + o, o_size * sizeof(T));
        depth += p.K;
      }
      column_panels<T>(i_size, [&](auto vectors, int64_t c) {
        constexpr int64_t width = vectors * lanes<T>;
        T* const x = packed_x + most * c;
        for (int64_t j = begin, r = 0; j < end; ++j)
          for (int64_t k = 0; k < products[j].K; ++k, ++r) FASTMAML_UNROLL(v, vectors) {
              store(x + r * width + v * lanes<T>,
                    load(products[j].b + k * products[j].ldb + i + c + v * lanes<T>));
            });
        const bool first = begin == 0 && !add;
        const Factors<T> f{packed, 1, rows, x - c, width, depth};
        nn_panel<T, nn_rows<vectors>, vectors, 1>(o_size, &f, 1, c, sum, columns,
                                                  Update<T>{first ? nullptr : sum, T(1), nullptr});
      });
      begin = end;
    }
    for (int64_t r = 0; r < o_size; ++r) {
      T* const to = out + (o + r) * I + i;
      for (int64_t c = 0; c < i_size; ++c) to[c] = ends.empty() && !add ? T(0) : -sum[r * columns + c];
    }
  }
};

template <class T>
struct Run {
  using Products = OuterProducts<T>;

  const Request& q;
  const Call<T> c{q};
  const Partition& parts = c.parts;
  const int64_t P = q.grads ? c.plan.P : 0, L = q.grad_lr ? c.K * c.lr_size() : 0, both = P + L;
  const bool sum_tasks = !q.per_task && both > 0;
  const int64_t at_once = std::min<int64_t>(q.threads, parts.sets);
  const Arena memory{(sum_tasks ? parts.sets : at_once * c.group) * both * sizeof(T)};
  T* const sums = static_cast<T*>(memory.data());
  std::vector<std::unique_ptr<Worker<T>>> workers = {};

  void write(const T* sum, int64_t t) const {
    if (P) c.slots_to_flat(sum, static_cast<T*>(q.grads) + t * c.plan.program.P);
    if (L) c.write_lr_grad(sum + P, static_cast<T*>(q.grad_lr) + t * c.K * c.S);
  }

  void run_group(int64_t round, int64_t group, int64_t worker) {
    Worker<T>& w = *workers[worker];
    w.memory.prepare();
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
        for (int64_t o = 0; o < p.O; o += Products::rows)
          for (int64_t i = 0; i < p.I; i += Products::columns)
            items.push_back({all.back().get(), o, std::min(Products::rows, p.O - o), i,
                             std::min(Products::columns, p.I - i), out, add});
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
      if (!q.per_task) all.emplace_back(new Products{p.I});
      for (int64_t j = 0; j < parts.groups(round); ++j)
        for (int64_t set = parts.group(round, j); set < parts.group(round, j + 1); ++set) {
          const int64_t begin = parts.task(set), end = parts.task(set + 1);
          if (!q.per_task) collect(j, begin, end);
          for (int64_t t = begin; t < end && q.per_task; ++t) {
            all.emplace_back(new Products{p.I});
            collect(j, t, t + 1);
            finish(t, false);
          }
        }
      if (!q.per_task) finish(0, round > 0);
    }
    const Arena scratch(q.threads * Products::scratch_size * sizeof(T));
    parallel(items.size(), q.threads, [&](int64_t j, int worker) {
      const Item& item = items[j];
      item.of->write(item.o, item.o_size, item.i, item.i_size, item.out, item.add,
                     static_cast<T*>(scratch.data()) + worker * Products::scratch_size);
    });
  }

  void run() {
    const int64_t x_size = c.plan.program.buffers[0].R * c.plan.program.buffers[0].C;
    if (q.grad_x_s) std::memset(q.grad_x_s, 0, q.T * c.N * x_size * sizeof(T));
    if (q.grad_x_q) std::memset(q.grad_x_q, 0, q.T * c.Q * x_size * sizeof(T));
    for (int64_t i = 0; i < at_once; ++i) workers.emplace_back(new Worker<T>(c));
    for (int64_t round = 0; round < parts.rounds; ++round) {
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
    const int64_t slice = int64_t(1) << 14;
    parallel((both + slice - 1) / slice, q.threads, [&](int64_t part, int) {
      const int64_t end = std::min((part + 1) * slice, both);
      for (int64_t j = 1; j < parts.sets; ++j)
        for (int64_t i = part * slice; i < end; ++i) sums[i] += sums[j * both + i];
    });
    write(sums, 0);
  }
};

inline void run_request(const Request& q) { q.is_double ? Run<double>{q}.run() : Run<float>{q}.run(); }

}  // namespace fastmaml::FASTMAML_ISA
