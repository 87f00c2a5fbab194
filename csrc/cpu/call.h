// What all tasks of a call share, and how parameters lie inside of it.
#pragma once
#include <memory>
#include <optional>

#include "factored.h"
#include "partition.h"
#include "request.h"

namespace fastmaml::FASTMAML_ISA {

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
  const Plan& plan;
  int64_t N, Q, K, S, every;  // every: steps between two stored W_k
  bool adjoint, keep;         // is there a sweep back; are the steps' activations and weights kept for it
  bool scaled;  // is the tangent a_k v a copy, because a_k is not one number or v changes while it is read
  bool any_own = false;
  Partition parts;
  int64_t group = 1, side_by_side = 1;  // most tasks that share a product with theta; of them, in one sweep
  std::unique_ptr<T[]> theta;           // in slots, where shared by the tasks
  std::unique_ptr<T[]> minus_lr;        // [K, P] in slots: -a, where it has a number for each element
  mutable OwnVector<double> losses;     // [T], where their sum is wanted
  std::optional<Arena> packed;
  std::vector<Theta<T>> thetas;      // of the factored layers, by op
  std::vector<int64_t> query_steps;  // after which the adjoint has the gradient of the query set

  explicit Call(const Request& request)
      : q(request),
        plan(plan_for(*request.program, lanes<T>, 64 / sizeof(T), request.factored,
                      request.grad_x_s || request.grad_x_q)),
        N(q.support.n),
        Q(q.query.n),
        K(q.K),
        S(q.S) {
    // the activations of the steps are the fast weights where these are factored: all of them stay
    const bool checkpoints = q.checkpoint_every > 0 && q.checkpoint_every < K && !plan.factored;
    every = checkpoints ? q.checkpoint_every : std::max<int64_t>(K, 1);
    adjoint = q.grads || q.grad_lr || q.grad_x_s;
    const bool second_order = !q.first_order && (q.grads || q.grad_x_s || (q.grad_lr && K > 1));
    keep = adjoint && K > 0 && (second_order || q.grad_lr || !q.step_weights.empty() || q.weight_decay != 0);
    scaled = !q.plain || S != 1 || plan.frozen || plan.tied || plan.factored;
    for (char own : q.own) any_own |= own != 0;
    for (int64_t k = 1; k < K && adjoint; ++k)
      if (!q.step_weights.empty() && q.step_weights[k - 1] != 0) query_steps.push_back(k);
    query_steps.push_back(K);
    if (q.total_loss) losses.resize(q.T);
    theta.reset(new T[plan.P]());
    for (std::size_t i = 0; i < q.params.size(); ++i)
      if (!q.own[i])
        to_slot(plan.slots[i], static_cast<const T*>(q.params[i]), theta.get() + plan.slots[i].offset);
    if (plan.factored) factor();
    const int64_t both = q.per_task ? 0 : (q.grads ? plan.P : 0) + (q.grad_lr ? K * lr_size() : 0);
    divide(both);
    if (plan.factored) group = parts.largest_group();
    if (plan.side_by_side) side_by_side = group;
    if (element_lr()) {
      minus_lr.reset(new T[K * plan.P]());
      for (int64_t k = 0; k < K; ++k)
        flat_to_slots(static_cast<const T*>(q.lr) + k * S, minus_lr.get() + k * plan.P);
      for (int64_t i = 0; i < K * plan.P; ++i) minus_lr[i] = -minus_lr[i];
    }
  }

  // theta for products with the rows of many tasks
  void factor() {
    struct Panel {
      Packed<T> to;
      int64_t c, width;
      const T* from;
      int64_t row, step;
    };
    std::vector<Panel> panels;
    thetas.resize(plan.ops.size());
    int64_t size = 0;
    for (const OpPlan& o : plan.ops) {
      if (o.form == Form::dense) continue;
      const Param& p = plan.program.params[o.op.w];
      size += Packed<T>::size(on_amx(o, p.I, p.O), p.I, p.O);
      if (o.form == Form::factored) size += Packed<T>::size(on_amx(o, p.O, p.I), p.O, p.I);
    }
    packed.emplace(size * sizeof(T));
    T* at = static_cast<T*>(packed->data());
    for (std::size_t i = 0; i < plan.ops.size(); ++i) {
      const OpPlan& o = plan.ops[i];
      if (o.form == Form::dense) continue;
      const Param& p = plan.program.params[o.op.w];
      const T* const w = static_cast<const T*>(q.params[o.op.w]);
      auto pack = [&](int64_t rows, int64_t columns, int64_t row, int64_t step) {
        const Packed<T> to{rows, columns, on_amx(o, rows, columns), at};
        at += Packed<T>::size(to.on_amx, rows, columns);
        column_panels<T>(columns, [&](auto vectors, int64_t c) {
          panels.push_back({to, c, vectors * lanes<T>, w, row, step});
        });
        return to;
      };
      std::vector<T> rates;
      for (int64_t k = 0; k < K; ++k)
        rates.push_back(p.adapt ? static_cast<const T*>(q.lr)[k * S + (S == 1 ? 0 : o.op.w)] : T(0));
      thetas[i].by = Coefficients<T>(std::move(rates), q.momentum, q.weight_decay);
      thetas[i].forward = pack(p.I, p.O, 1, p.I);
      if (o.form == Form::factored) thetas[i].backward = pack(p.O, p.I, p.I, 1);
    }
    parallel(panels.size(), q.threads, [&](int64_t i, int) {
      const Panel& p = panels[i];
      p.to.fill(p.c, p.width, p.from, p.row, p.step);
    });
  }

  // for products with most of the rows of a call, however many threads share these
  bool on_amx(const OpPlan& o, int64_t rows, int64_t columns) const {
    return Packed<T>::uses_amx(q.T * (K > 0 ? N : Q) * plan.program.buffers[o.op.in0].R, rows, columns);
  }

  // both: numbers in a sum over tasks, 0 for none. A factored program's thread has 80 rows for its product
  // with theta, so as not to read theta too often, but no more than leave what the steps keep of them within
  // 12 MiB, so as not to lose that from the cache between two steps; 20 where theta stays in the cache itself
  // (measured, but not on the matrix unit); or what 2 MiB hold. A round has no more than some 256 MiB hold.
  void divide(int64_t both) {
    const int64_t n = std::max<int64_t>(N, 1), least = plan.factored ? std::max<int64_t>(10 / n, 1) : 1;
    int64_t count = (q.T + least - 1) / least;  // of sets
    const int64_t most = plan.factored || both == 0 ? count : 64;
    if (both > 0)
      count = std::min(count, std::clamp<int64_t>((int64_t(1) << 22) / both, 8, std::max<int64_t>(most, 8)));
    parts = Partition(q.T, count);
    if (!plan.factored) return parts.divide_by_halves(q.threads);
    const int64_t steps = plan.side_by_side ? K : 1, MiB = int64_t(1) << 20;
    const int64_t queries = plan.side_by_side ? query_steps.size() : 1;
    const int64_t x = (N + Q) * plan.program.buffers[0].R * plan.ld[0];
    const int64_t kept = 4 * steps * N * plan.per_example * sizeof(T) + 1;
    const int64_t each = kept + (2 * queries * Q * plan.per_example + x) * sizeof(T);
    // the weights that stay dense, of tasks side by side: those of all steps, momenta, adjoints
    const int64_t sets = plan.side_by_side ? ((keep ? K + 1 : 2) + 2) * (q.plain ? 1 : 2) + 1 : 0;
    const int64_t dense = sets * plan.P * sizeof(T);
    bool amx = false, small = plan.side_by_side;
    for (const OpPlan& o : plan.ops) {
      if (o.form == Form::dense) continue;
      const Param& p = plan.program.params[o.op.w];
      amx |= on_amx(o, p.I, p.O);
      small &= o.form == Form::fixed_input || p.I * p.O * static_cast<int64_t>(sizeof(T)) <= MiB / 4;
    }
    const int64_t of_80 = 80 / n + 1, of_20 = 20 / n + 1;  // tasks that have so many rows
    const int64_t few = amx ? of_80 : small ? of_20 : std::clamp(12 * MiB / kept, of_20, of_80);
    const int64_t wanted = std::min(q.threads * std::max(few, 2 * MiB / each), 256 * MiB / (each + dense));
    const int64_t rounds = (q.T + wanted - 1) / std::max<int64_t>(wanted, 1);
    parts.divide_evenly(q.threads, std::clamp<int64_t>(rounds, 1, count));
  }

  int64_t n_params() const { return plan.slots.size(); }
  bool element_lr() const { return K > 0 && S != 1 && S != n_params(); }
  int64_t lr_size() const { return element_lr() ? plan.P : S; }  // of one step's gradient, inside

  void flat_to_slots(const T* flat, T* slots) const {
    for (int64_t i = 0; i < n_params(); ++i)
      to_slot(plan.slots[i], flat + plan.program.params[i].offset, slots + plan.slots[i].offset);
  }
  // all but the factored weights
  void slots_to_flat(const T* slots, T* flat) const {
    for (int64_t i = 0; i < n_params(); ++i) {
      const Param& p = plan.program.params[i];
      const int64_t end = p.offset + p.O * p.I,
                    next = i + 1 < n_params() ? plan.program.params[i + 1].offset : plan.program.P;
      from_slot(plan.slots[i], slots + plan.slots[i].offset, flat + p.offset);
      std::memset(flat + end, 0, (next - end) * sizeof(T));
    }
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

}  // namespace fastmaml::FASTMAML_ISA
