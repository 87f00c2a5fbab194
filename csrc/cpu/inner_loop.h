// The whole inner loop, tail and adjoint (DESIGN: v_k = v_{k+1} - H_k (a_k v_{k+1})), for every task of a call.
#pragma once
#include "worker.h"

namespace fastmaml::FASTMAML_ISA {

// The gradient of a factored layer's theta [O, I]: minus the sum of its outer products d^T x.
template <class T>
struct OuterProducts {
  static constexpr int64_t most = 256;  // rows at a time, so that the panel of x stays in cache

  int64_t I;
  std::vector<Factors<T>> products = {};
  std::vector<int64_t> ends = {};  // of the products done at once

  void add(const T* d, int64_t ldd, const T* x, int64_t ldx, int64_t rows) {
    for (int64_t r = 0; r < rows;) {
      const int64_t some = std::min(rows - r, most - filled);
      products.push_back({d + r * ldd, 1, ldd, x + r * ldx, ldx, some});
      r += some, filled += some;
      if (filled == most) close();
    }
  }
  void close() {
    if (ends.empty() ? !products.empty() : ends.back() < static_cast<int64_t>(products.size()))
      ends.push_back(products.size());
    filled = 0;
  }

  static constexpr int64_t rows = 32, widest = 4 * lanes<T>;  // of a block of the gradient

  // `some` rows of it from row o on, at most `rows`
  void write(int64_t o, int64_t some, T* out, bool add) const {
    alignas(64) T sum[rows * widest];
    column_panels<T>(I, [&](auto vectors, int64_t c) {
      const int64_t width = vectors * lanes<T>;
      Factors<T> f[most + 1];
      int64_t begin = 0;
      for (std::size_t i = 0; i < ends.size(); ++i) {
        for (int64_t j = begin; j < ends[i]; ++j) f[j - begin] = products[j], f[j - begin].a += o;
        const Update<T> e{i == 0 ? nullptr : sum - c, T(1), nullptr};
        nn_panel<T, nn_rows<vectors>, vectors, 0>(some, f, ends[i] - begin, c, sum - c, width, e);
        begin = ends[i];
      }
      for (int64_t r = 0; r < some; ++r)
        for (int64_t j = 0; j < std::min(width, I - c); ++j) {
          T& to = out[(o + r) * I + c + j];
          const T part = ends.empty() ? T(0) : sum[r * width + j];
          to = add ? to - part : -part;
        }
    });
  }

  int64_t filled = 0;
};

// Tasks are run in groups, each with sums of its own. Of a dense program the groups, and so the result, do not depend
// on the number of threads; of a factored one a group is what a thread has of a round.
template <class T>
struct Run {
  const Request& q;
  const Call<T> c{q};
  const int64_t P = q.grads ? c.plan.P : 0, L = q.grad_lr ? c.K * c.lr_size() : 0, both = P + L;
  const bool sum_tasks = !q.per_task && both > 0;
  const int64_t groups = c.plan.factored ? (q.T + c.group - 1) / c.group
                         : sum_tasks ? std::min(q.T, std::clamp<int64_t>((int64_t(1) << 22) / both, 8, 64))
                                     : q.T;
  const Arena memory{(sum_tasks ? groups : std::min<int64_t>(q.threads, groups) * c.group) * both * sizeof(T)};
  T* const sums = static_cast<T*>(memory.data());
  std::vector<std::unique_ptr<Worker<T>>> workers = {};

  void write(const T* sum, int64_t t) const {
    if (P) c.slots_to_flat(sum, static_cast<T*>(q.grads) + t * c.plan.program.P);
    if (L) c.write_lr_grad(sum + P, static_cast<T*>(q.grad_lr) + t * c.K * c.S);
  }

  // group j in the memory of a worker
  void run_group(int64_t j, int64_t worker) {
    Worker<T>& w = *workers[worker];
    w.prepare();
    T* const sum = sums + (sum_tasks ? j : worker * c.group) * both;
    std::vector<Sums<T>>& places = w.sums;
    const int64_t begin = q.T * j / groups, end = q.T * (j + 1) / groups, sets = sum_tasks ? 1 : c.group;
    for (int64_t i = 0; i < sets; ++i) std::fill(sum + i * both + P, sum + (i + 1) * both, T(0));
    for (int64_t t = begin; t < end;) {
      const int64_t some = std::min(c.group, end - t);
      for (int64_t i = 0; i < some; ++i) {
        T* const to = sum + (sum_tasks ? 0 : i) * both;
        places[i] = {P ? to : nullptr, L ? to + P : nullptr, sum_tasks && t + i > begin};
      }
      w.run_group(t, t + some, places.data());
      for (int64_t i = 0; i < some && q.per_task; ++i) write(sum + i * both, t + i);
      t += some;
    }
  }

  // the gradients of the factored layers, from the groups `first` to `last` that the workers have run
  void write_factored(int64_t first, int64_t last) {
    struct Item {
      const OuterProducts<T>* of;
      int64_t o, rows;
      T* out;
      bool add;
    };
    std::vector<std::unique_ptr<OuterProducts<T>>> all;
    std::vector<Item> items;
    for (std::size_t i = 0; i < c.plan.ops.size(); ++i) {
      const OpPlan& o = c.plan.ops[i];
      if (o.form == Form::dense) continue;
      const Param& p = c.plan.program.params[o.op.w];
      const int64_t ldd = c.plan.ld[o.op.out], ldx = c.plan.ld[o.op.in0];
      auto collect = [&](int64_t group, int64_t task, int64_t tasks) {
        workers[group - first]->outer_products(i, task, tasks, [&](const T* d, const T* x, int64_t rows) {
          all.back()->add(d, ldd, x, ldx, rows);
        });
      };
      auto finish = [&](int64_t row, bool add) {
        all.back()->close();
        T* const out = static_cast<T*>(q.grads) + row * c.plan.program.P + p.offset;
        for (int64_t at = 0; at < p.O; at += OuterProducts<T>::rows)
          items.push_back({all.back().get(), at, std::min(OuterProducts<T>::rows, p.O - at), out, add});
      };
      if (q.per_task) {
        for (int64_t j = first; j < last; ++j)
          for (int64_t t = q.T * j / groups; t < q.T * (j + 1) / groups; ++t) {
            all.emplace_back(new OuterProducts<T>{p.I});
            collect(j, t - q.T * j / groups, 1);
            finish(t, false);
          }
      } else {
        all.emplace_back(new OuterProducts<T>{p.I});
        for (int64_t j = first; j < last; ++j) collect(j, 0, q.T * (j + 1) / groups - q.T * j / groups);
        finish(0, first > 0);
      }
    }
    parallel(items.size(), q.threads, [&](int64_t i, int) {
      items[i].of->write(items[i].o, items[i].rows, items[i].out, items[i].add);
    });
  }

  void run() {
    const int64_t x_size = c.plan.program.buffers[0].R * c.plan.program.buffers[0].C;
    if (q.grad_x_s) std::memset(q.grad_x_s, 0, q.T * c.N * x_size * sizeof(T));
    if (q.grad_x_q) std::memset(q.grad_x_q, 0, q.T * c.Q * x_size * sizeof(T));
    const int64_t at_once = std::min<int64_t>(q.threads, groups);
    for (int64_t i = 0; i < at_once; ++i) workers.emplace_back(new Worker<T>(c));
    if (!c.plan.factored) parallel(groups, q.threads, [&](int64_t j, int worker) { run_group(j, worker); });
    for (int64_t first = 0; c.plan.factored && first < groups; first += at_once) {
      const int64_t last = std::min(first + at_once, groups);
      parallel(last - first, q.threads, [&](int64_t j, int) { run_group(first + j, j); });
      if (q.grads) write_factored(first, last);
    }
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
};

inline void run_request(const Request& q) {
  q.is_double ? Run<double>{q}.run() : Run<float>{q}.run();
}

}  // namespace fastmaml::FASTMAML_ISA
