// What a worker's tasks have in memory: weights, adjoints, and the frames of their sweeps.
#pragma once
#include "call.h"

namespace fastmaml::FASTMAML_ISA {

template <class T>
struct Memory {
  const Call<T>& c;
  const Plan& plan;
  const int64_t P, N, Q, K, L, ld0;                     // L: tasks side by side; ld0: of an example
  const int64_t frames, weight_sets;                    // of the steps: frames, W_k of a task
  const int64_t frame, t_frame, q_frame, query_frames;  // floats of a step's frames, of a query set's; those
  const Places support_places, query_places;
  std::optional<Arena> arena;
  T *theta_own, *stored, *segment, *v, *u, *g, *support_frames, *query_frame, *tangent_frames;
  T *padded_s, *padded_q;       // x, where it is not read in place
  const T *x_s, *x_q;           // of the tasks of a group, in rows of ld[0] numbers
  T *stored_m, *segment_m, *n;  // M_k, as W_k; dL/dM
  T *scaled, *product;          // scratch of the factored layers
  bool dual;                    // are there tangents?

  explicit Memory(const Call<T>& call)
      : c(call),
        plan(call.plan),
        P(plan.P),
        N(call.N),
        Q(call.Q),
        K(call.K),
        L(call.side_by_side),
        ld0(plan.program.buffers[0].R * plan.ld[0]),
        frames(K == 0              ? 0
               : c.keep            ? c.every
               : plan.side_by_side ? K
                                   : 1),
        weight_sets(c.keep ? (K + c.every - 1) / c.every + 1 : 2),
        frame(plan.frame_size(N, L)),
        t_frame(plan.side_by_side ? frame : plan.frame_size(std::max(N, Q), 1)),
        q_frame(plan.frame_size(Q, L)),
        query_frames(plan.side_by_side ? c.query_steps.size() : 1),  // they are what v has
        support_places(plan, N, L),
        query_places(plan, Q, L),
        dual(c.keep || c.q.tail == Tail::curvature) {
    const int64_t kept = L * weight_sets * P, more = c.keep ? L * (c.every - 1) * P : 0;
    const int64_t of_x = x_in_place() ? 0 : c.group * ld0;
    const int64_t tangents = !dual ? 0 : plan.side_by_side ? frames * t_frame : t_frame;
    std::vector<std::pair<T**, int64_t>> parts;
    parts.reserve(16);
    parts.insert(parts.end(), {{&support_frames, frames * frame},
                               {&query_frame, query_frames * q_frame},
                               {&tangent_frames, tangents},
                               {&padded_s, K > 0 ? N * of_x : 0},
                               {&padded_q, Q * of_x},
                               {&theta_own, L * P},
                               {&stored, kept},
                               {&segment, more},
                               {&v, L * P},
                               {&u, L * P}});
    if (c.q.plain)
      parts.push_back({&g, P});
    else
      parts.insert(parts.end(), {{&g, L * P}, {&stored_m, kept}, {&segment_m, more}, {&n, L * P}});
    int64_t of_scaled = 0, of_product = 0;
    for (const OpPlan& o : plan.ops) {
      if (o.form != Form::factored) continue;
      const int64_t R = plan.program.buffers[o.op.in0].R, B = c.query_steps.size();
      of_scaled = std::max(of_scaled, FactoredLayer<T>::scaled_size(N * R, Q * R, K, B));
      if (c.q.weight_decay != 0)
        of_product =
            std::max(of_product, L * std::max(N, Q) * R * std::max(plan.ld[o.op.in0], plan.ld[o.op.out]));
    }
    parts.insert(parts.end(), {{&scaled, of_scaled}, {&product, of_product}});
    int64_t total = 0;
    for (const auto& [_, size] : parts) total += round_up(size, 16);
    arena.emplace(total * sizeof(T));
    T* at = static_cast<T*>(arena->data());
    for (const auto& [part, size] : parts) *part = std::exchange(at, at + round_up(size, 16));
    clear_all_padding();
  }

  // What pads the rows of the frames and of x must be zero: products read it.
  void clear_all_padding() {
    auto clear = [&](T* at, int64_t examples, int64_t frames, int64_t stride) {
      for (int64_t f = 0; f < frames; ++f)
        for (int64_t half = 0; half < 2; ++half)  // values and gradients
          for (std::size_t b = plan.x_in_frames ? 0 : 1; b < plan.ld.size(); ++b)
            clear_padding(b, examples,
                          at + f * stride + examples * (half * plan.per_example + plan.before[b]));
    };
    clear(support_frames, L * N, frames, frame);
    clear(query_frame, L * Q, query_frames, q_frame);
    if (plan.side_by_side) clear(tangent_frames, L * N, c.keep ? frames : 0, t_frame);
    if (!plan.side_by_side && dual) std::memset(tangent_frames, 0, t_frame * sizeof(T));  // of either set
    if (K > 0) clear_padding(0, c.group * N, padded_s);
    clear_padding(0, c.group * Q, padded_q);
  }
  void clear_padding(std::size_t b, int64_t examples, T* at) const {
    const Buffer& buffer = plan.program.buffers[b];
    const int64_t ld = plan.ld[b], first = buffer.C / lanes<T> * lanes<T>;  // of the vectors that hold some
    for (int64_t r = 0; r < examples * buffer.R; ++r)
      for (int64_t c = first; c < ld; c += lanes<T>) store(at + r * ld + c, Vec<T>{});
  }

  // x is read where it lies if its rows need no padding
  bool x_in_place() const { return plan.ld[0] == plan.program.buffers[0].C; }
  // that of the tasks of a group, from `begin` on
  void take_x(int64_t begin, int64_t tasks) {
    x_s = K > 0 ? rows_of(c.q.support, begin, tasks, padded_s) : padded_s;
    x_q = c.q.tail != Tail::weights ? rows_of(c.q.query, begin, tasks, padded_q) : padded_q;
  }
  const T* rows_of(const Set& set, int64_t begin, int64_t tasks, T* padded) const {
    const Buffer& x = plan.program.buffers[0];
    const T* const from = static_cast<const T*>(set.x) + begin * set.n * x.R * x.C;
    if (x_in_place()) return from;
    copy_rows(tasks * set.n * x.R, x.C, from, x.C, padded, plan.ld[0]);
    return padded;
  }

  // W_k: stored at every `every`-th step, in the current segment else. Without an adjoint two take turns.
  T* weights(int64_t k, int64_t task) const { return of_step(k, task, stored, segment); }
  T* momenta(int64_t k, int64_t task) const { return of_step(k, task, stored_m, segment_m); }
  T* of_step(int64_t k, int64_t task, T* stored, T* segment) const {
    if (!c.keep) return stored + (task * weight_sets + (k & 1)) * P;
    const int64_t set = k < c.every ? 0 : k / c.every, rest = k - set * c.every;
    return rest == 0 ? stored + (task * weight_sets + set) * P
                     : segment + (task * (c.every - 1) + rest - 1) * P;
  }
  const T* weights_at(int64_t k, int64_t task) const {
    if (k > 0) return weights(k, task);
    return c.any_own ? theta_own + task * P : c.theta.get();
  }

  // offset: of the tasks side by side in the group
  void add_support_pass(OwnVector<Pass<T>>& to, int64_t k, int64_t task, int64_t offset) const {
    T* const at = support_frames + (k < frames ? k : frames > 1 ? k % frames : 0) * frame;
    to.emplace_back(
        plan, N, support_places.of(task), x_s + (offset + task) * N * ld0,
        carve_frame(plan, support_places, task, at),
        carve_frame(plan, support_places, task, tangent_frames + (plan.side_by_side ? k * t_frame : 0)),
        weights_at(k, task));
  }
  void add_query_pass(OwnVector<Pass<T>>& to, int64_t k, int64_t task, int64_t offset) const {
    const int64_t i = std::find(c.query_steps.begin(), c.query_steps.end(), k) - c.query_steps.begin();
    to.emplace_back(plan, Q, query_places.of(task), x_q + (offset + task) * Q * ld0,
                    carve_frame(plan, query_places, task, query_frame + i % query_frames * q_frame),
                    carve_frame(plan, query_places, task, tangent_frames), weights_at(k, task));
  }
};

}  // namespace fastmaml::FASTMAML_ISA
