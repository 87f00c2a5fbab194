// One task, by one team: K inner steps, the tail, and the adjoint
//   v_k = v_{k+1} - H_k (a_k v_{k+1}),   dL/da_k = -<v_{k+1}, g_k>
// in turns, each of them one sweep: so that either sweep is compiled once. The current W, v and the buffers
// of one sweep are in shared memory, the W_k of earlier steps in global memory.
#pragma once
#include "sweep.cuh"

namespace fastmaml::cuda::FASTMAML_TEAM {

enum class Turn { descend, query, adjoint, done };

template <class T>
struct Task {
  const Table& table;
  const Call& call;
  const int64_t task;
  const int K = static_cast<int>(call.K), every = static_cast<int>(call.every);
  const bool second_order = !call.first_order && (call.grads || call.grad_x_s || call.grad_lr),
             at_steps = call.step_weights != nullptr,
             returns = table.v >= 0 && table.buffer[table.output].tangent && K > 0 &&
                       (second_order || call.grad_lr || at_steps);  // is there a way back through the steps?
  Turn turn = K > 0 ? Turn::descend : Turn::query;
  int k = 0;            // the turn reads W_k
  bool back = false;    // is this the way back?
  int redo_until = -1;  // steps are done again up to this one, whose W_k was written over
  int held = -1;        // W_held is in shared memory
  int examples = -1;    // 0: those of the support set are, 1: of the query set
  T total = 0;          // of the losses, in thread 0

  template <class S>
  FASTMAML_DEVICE static const T* numbers(const S* p) {
    return static_cast<const T*>(static_cast<const void*>(p));
  }

  // A set of weights from global memory; from(i): where parameter i begins
  template <class F>
  FASTMAML_DEVICE void load_set(int to, const F& from) const {
    for (int i = 0; i < table.params; ++i) {
      const ParamRow& q = table.param[i];
      const T* const p = from(i);
      each(q.O, q.ld,
           [&](int o, int c) { shared<T>()[to + q.at + o * q.ld + c] = c < q.I ? p[o * q.I + c] : T(0); });
    }
  }
  FASTMAML_DEVICE void load_flat(int to, const void* rows) const {
    const T* const row = numbers(rows) + task * table.flat_P;
    load_set(to, [&](int i) { return row + table.param[i].flat; });
  }
  FASTMAML_DEVICE void store_flat(int from, void* rows) const {
    T* const row = static_cast<T*>(rows) + task * table.flat_P;
    for (int i = 0; i < table.params; ++i) {
      const ParamRow& q = table.param[i];
      each(q.space, [&](int j) {
        row[q.flat + j] = j < q.O * q.I ? shared<T>()[from + q.at + j / q.I * q.ld + j % q.I] : T(0);
      });
    }
  }
  template <class From, class To>  // memory of either kind
  FASTMAML_DEVICE void copy(From from, To to) const {
    each(table.P / lanes<T>, [&](int i) { store(to + i * lanes<T>, load(from + i * lanes<T>)); });
  }

  // W_k: every `every`-th has a place of its own, the others that of their distance from it
  FASTMAML_DEVICE T* stored() const {
    const int64_t own = (K - 1) / every, set = k % every == 0 ? k / every - 1 : own + k % every - 1;
    return static_cast<T*>(call.stored) + (task * call.stored_sets + set) * table.P;
  }
  FASTMAML_DEVICE void hold() {
    if (held == k) return;
    if (k == 0)
      load_set(table.w, [&](int i) {
        const ParamRow& q = table.param[i];
        return numbers(call.params[i]) + (call.own[i] ? task * q.O * q.I : 0);
      });
    else
      copy(stored(), shared<T>() + table.w);
    held = k;
  }

  FASTMAML_DEVICE const Set& set() const { return turn == Turn::query ? call.query : call.support; }
  FASTMAML_DEVICE void load_examples() {
    if (examples == (turn == Turn::query)) return;
    examples = turn == Turn::query;
    const BufferRow& b = table.buffer[0];
    const int n = static_cast<int>(set().n), rows = n * b.R;
    const T* const x = numbers(set().x) + task * rows * b.C;
    const T* const weight = set().weight ? numbers(set().weight) + task * n : nullptr;
    each(rows, b.ld,
         [&](int row, int c) { shared<T>()[table.x + row * b.ld + c] = c < b.C ? x[row * b.C + c] : T(0); });
    T sum = n;
    if (weight) {
      sum = 0;
      for (int i = 0; i < n; ++i) sum += weight[i];
    }
    each(n, [&](int i) { shared<T>()[table.share + i] = (weight ? weight[i] : T(1)) / sum; });
  }

  // the factor of a query loss, and that of its gradients
  FASTMAML_DEVICE T query_scale() const {
    return at_steps ? numbers(call.step_weights)[k - 1] * T(call.scale) : T(call.scale);
  }
  FASTMAML_DEVICE T gradient_scale() const {
    if (call.tail != tail_curvature) return query_scale();
    return call.grad_loss ? numbers(call.grad_loss)[task] : T(0);
  }

  FASTMAML_DEVICE void begin() {
    hold();
    if (turn == Turn::query && call.tail == tail_weights) return;
    load_examples();
    if (turn == Turn::descend && returns && k > 0) copy(shared<T>() + table.w, stored());
    if (turn == Turn::query && !back && table.v >= 0)
      each(table.P, [&](int i) { shared<T>()[table.v + i] = 0; });
    if (turn == Turn::query && call.tail == tail_curvature) load_flat(table.u, call.seed);
    if (turn == Turn::adjoint && table.tied) copy(shared<T>() + table.v, shared<T>() + table.u);
    if (turn == Turn::adjoint && table.products >= 0)
      each(table.params * warps(), [&](int i) { shared<T>()[table.products + i] = 0; });
  }

  FASTMAML_DEVICE bool dual() const {
    if (turn == Turn::adjoint) return second_order;
    return turn == Turn::query && call.tail == tail_curvature && table.buffer[table.output].tangent;
  }

  FASTMAML_DEVICE Pass<T> pass() const {
    Pass<T> p{table, table.layout[turn == Turn::query ? of_query : dual() ? of_adjoint : of_step]};
    p.S = static_cast<int>(call.S);
    p.precision = static_cast<Precision>(call.precision);
    p.lr = numbers(call.lr) + k * call.S;
    if (turn == Turn::descend) {
      p.grad_base = table.w;
      p.grad_dst = table.tied ? table.u : table.w;  // tied weights are read after their first update
      p.descends = p.skip_frozen = true;
    } else if (turn == Turn::adjoint) {
      p.grad_base = p.grad_dst = second_order ? table.v : -1;
      p.grad_scale = -1;
      p.t_w = table.tied ? table.u : table.v;  // tied ones lead on to others after v has been changed
      p.t_scaled = true;
      p.multiplies = call.grad_lr;
      p.products = call.grad_lr && call.S != 1 && call.S != table.params ? lr_row() : nullptr;
      p.x_grad = second_order && call.grad_x_s;
    } else {
      p.grad_base = back ? table.v : -1;
      p.grad_dst = table.v;
      p.grad_scale = dual() ? T(1) : gradient_scale();
      p.grad_primal = dual() ? gradient_scale() : T(0);
      p.t_w = table.u;
      p.x_grad = call.grad_x_q;
    }
    return p;
  }
  FASTMAML_DEVICE T* lr_row() const { return static_cast<T*>(call.grad_lr) + (task * K + k) * call.S; }

  template <bool Dual>
  FASTMAML_DEVICE void sweep(const Pass<T>& p) const {
    forward<Dual>(p);
    if (turn == Turn::query && call.tail == tail_output) {
      copy_output(p);
    } else {
      const T part = warp_sum(loss<Dual>(p, set(), task));
      if (lane() == 0) shared<T>()[table.partial + warp()] = part;
    }
    sync_team();
    if (turn != Turn::query || table.v >= 0 || call.grad_x_q) backward<Dual>(p);
  }

  FASTMAML_DEVICE void copy_output(const Pass<T>& p) const {
    const int b = table.output, C = p.columns(b), ld = p.ld(b), rows = p.rows(b);
    each(rows, p.width(b), [&](int row, int c) {
      const int64_t at = (task * rows + row) * C + c;
      if (c < C && call.out) static_cast<T*>(call.out)[at] = p.value(b)[row * ld + c];
      if (call.seed) p.grad(b)[row * ld + c] = c < C ? numbers(call.seed)[at] : T(0);
    });
  }

  template <bool Dual>
  FASTMAML_DEVICE void add_x_grad(const Pass<T>& p, void* to, T primal, T tangent) const {
    const int C = p.columns(0), ld = p.ld(0), rows = p.rows(0);
    each(rows, C, [&](int row, int c) {
      T v = primal == 0 ? T(0) : primal * p.grad(0)[row * ld + c];
      if (Dual) v += tangent * p.t_grad(0)[row * ld + c];
      static_cast<T*>(to)[(task * rows + row) * C + c] += v;
    });
  }

  FASTMAML_DEVICE void end(const Pass<T>& p) {
    if (turn == Turn::descend) {
      ++held;
      for (int i = 0; i < table.params && table.tied; ++i) {
        const ParamRow& q = table.param[i];
        if (q.uses && q.adapt)
          each(q.O * q.ld, [&](int j) { shared<T>()[table.w + q.at + j] = shared<T>()[table.u + q.at + j]; });
      }
    } else if (turn == Turn::adjoint) {
      if (p.x_grad) add_x_grad<true>(p, call.grad_x_s, T(0), T(-1));
      if (call.grad_lr && !p.products)
        each(int(call.S), [&](int i) {
          T sum = 0;
          const int first = call.S == 1 ? 0 : i * warps(),
                    last = call.S == 1 ? table.params * warps() : first + warps();
          for (int j = first; j < last; ++j) sum += shared<T>()[table.products + j];
          lr_row()[i] = -sum;
        });
    } else {
      if (call.loss && thread() == 0)
        for (int i = 0; i < warps(); ++i) total += query_scale() * shared<T>()[table.partial + i];
      if (!p.x_grad) return;
      if (dual())
        add_x_grad<true>(p, call.grad_x_q, gradient_scale(), T(1));
      else
        add_x_grad<false>(p, call.grad_x_q, gradient_scale(), T(0));
    }
  }

  // on the way back, before step k is undone
  FASTMAML_DEVICE void step_back() {
    back = true;
    turn = --k < 0 ? Turn::done : Turn::adjoint;
    if (k >= 0 && (k + 1) % every == 0 && k + 1 < K && every > 1) {
      redo_until = k;
      k -= every - 1;
      turn = Turn::descend;
    }
  }
  FASTMAML_DEVICE void next() {
    if (turn == Turn::descend) {
      ++k;
      if (back)
        turn = k == redo_until ? Turn::adjoint : Turn::descend;
      else if (k == K || (at_steps && !returns))
        turn = Turn::query;
    } else if (turn == Turn::adjoint) {
      if (at_steps && k > 0)
        turn = Turn::query;
      else
        step_back();
    } else if (back || (k == K && returns)) {
      step_back();
    } else {
      turn = k == K ? Turn::done : Turn::descend;
    }
  }

  FASTMAML_DEVICE void run() {
    for (; turn != Turn::done; next()) {
      begin();
      sync_team();
      if (turn == Turn::query && call.tail == tail_weights) {
        if (call.out) store_flat(table.w, call.out);
        if (call.seed) load_flat(table.v, call.seed);
      } else if (turn != Turn::query || k == K || query_scale() != 0) {
        const Pass<T> p = pass();
        if (dual())
          sweep<true>(p);
        else
          sweep<false>(p);
        end(p);
      }
      sync_team();
    }
    if (call.grads) store_flat(table.v, call.grads);
    if (call.loss && thread() == 0) static_cast<T*>(call.loss)[task] = total;
  }
};

// Rows of all tasks, added up by all teams
template <class T>
FASTMAML_DEVICE void sum_tasks(const Sums& sums) {
  for (int s = 0; s < sums.count; ++s) {
    const Sum& of = sums.of[s];
    for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < of.size;
         i += int64_t(gridDim.x) * blockDim.x) {
      T sum = 0;
      for (int64_t t = 0; t < sums.T; ++t) sum += static_cast<const T*>(of.rows)[t * of.size + i];
      static_cast<T*>(of.total)[i] = sum;
    }
  }
}

// There are as many teams as run at once, or as tasks.
// One block a multiprocessor is all that the bound asks for: with more in mind, ptxas spills for sm_100 and
// 120.
template <class T>
__global__ void __launch_bounds__(256, 1)
    inner_loop_kernel(const __grid_constant__ Table table, const __grid_constant__ Call call,
                      const __grid_constant__ Sums sums) {
#if FASTMAML_HAS_TEAM
  sync_team();  // every block of it runs: now the others may reach its memory
  for (int64_t task = team(); task < call.T; task += teams()) {
    Task<T>{table, call, task}.run();
    sync_team();
  }
  if (sums.count == 0) return;
  sync_grid();
  sum_tasks<T>(sums);
#endif
}

}  // namespace fastmaml::cuda::FASTMAML_TEAM
