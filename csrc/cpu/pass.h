// One sweep over a program for one task: what an op finds and where it writes.
#pragma once
#include "arena.h"
#include "matmul.h"
#include "plan.h"

namespace fastmaml::FASTMAML_ISA {

// The buffers of one sweep: values, gradients and what the ops keep, for n examples.
template <class T>
struct Frame {
  T* value = nullptr;
  T* grad = nullptr;
  T* saved = nullptr;
};

// of one of the tasks whose buffers lie at `places`
template <class T>
Frame<T> carve_frame(const Plan& plan, const Places& places, int64_t task, T* at) {
  const int64_t size = places.tasks * places.n * plan.per_example;
  return {at, at + size, at + 2 * size + task * plan.saved_size(places.n)};
}

// Where a parameter's gradient g goes: dst = base + scale * g. Plain: the next fast weights, W - a g. Dual:
// the adjoint, v - a H v. With no base just the gradient. `add`: to what dst holds, the sum over earlier
// tasks.
template <class T>
struct ParamGrad {
  T* dst;
  const T* base;
  T scale;
  const T* scale_each;
  bool add;

  Update<T> update() const { return {base, scale, scale_each, add}; }
};

template <class T>
struct Pass {
  const Plan& plan;
  int64_t n;          // examples
  const int64_t* at;  // of each buffer in the frames
  const T* x;         // [n * R, ld]: buffer 0
  Frame<T> primal;
  Frame<T> tangent;        // dual only
  const T* w;              // [P] in slots: the fast weights
  const T* t_w = nullptr;  // [P]: their tangent
  // parameter gradients (null dst: none wanted)
  T* grad_dst = nullptr;
  const T* grad_base = nullptr;
  T grad_scale = 1;
  const T* scale_each_tensor = nullptr;  // [params], multiplies grad_scale
  const T* scale_each = nullptr;         // [P], multiplies nothing else
  bool grad_add = false;
  bool skip_frozen = false;
  bool x_grad = false;       // is the gradient of buffer 0 wanted?
  bool only_params = false;  // the gradients of the buffers are there from an earlier pass

  // for emplace_back: what is copied right after it was written waits for its stores
  Pass(const Plan& plan, int64_t n, const int64_t* at, const T* x, Frame<T> primal, Frame<T> tangent,
       const T* w)
      : plan(plan), n(n), at(at), x(x), primal(primal), tangent(tangent), w(w) {}

  int64_t ld(int64_t b) const { return plan.ld[b]; }
  int64_t width(int64_t b) const { return round_up(plan.program.buffers[b].C, lanes<T>); }
  int64_t rows(int64_t b) const { return n * plan.program.buffers[b].R; }
  const T* value(int64_t b) const { return b == 0 ? x : primal.value + at[b]; }
  T* out(int64_t b) const { return primal.value + at[b]; }
  T* grad(int64_t b) const { return primal.grad + at[b]; }
  T* t_value(int64_t b) const { return tangent.value + at[b]; }
  T* t_grad(int64_t b) const { return tangent.grad + at[b]; }
  T* saved(const OpPlan& o, const Frame<T>& f) const {
    return f.saved + n * o.saved_each_before + o.saved_fixed_before;
  }
  const T* param(int64_t p) const { return p < 0 ? nullptr : w + plan.slots[p].offset; }
  const T* t_param(int64_t p) const { return p < 0 ? nullptr : t_w + plan.slots[p].offset; }

  // Is the gradient of a buffer wanted that moves with the parameters, or only with x?
  bool wants_grad(bool moves) const { return !only_params && (moves || x_grad); }

  bool wants_param_grad(int64_t p) const {
    return p >= 0 && grad_dst && !(skip_frozen && !plan.program.params[p].adapt);
  }

  ParamGrad<T> param_grad(int64_t p, bool first) const {
    const int64_t at = plan.slots[p].offset;
    const T scale = scale_each_tensor ? grad_scale * scale_each_tensor[p] : grad_scale;
    const T* base = !first ? grad_dst : grad_base;
    return {grad_dst + at, base ? base + at : nullptr, scale, scale_each ? scale_each + at : nullptr,
            first && grad_add};
  }
};

// A sweep over the tasks side by side, and where the rows of the others are.
template <class T>
struct Sweep {
  OwnVector<Pass<T>> tasks;                // of this sweep
  const OwnVector<Pass<T>>*first, *query;  // of step 0, of the first query set that v has
  int64_t frame, t_frame, query_frame;     // from one frame of a kind to the next
  int64_t offset, begin;                   // of those side by side in the group; of this sweep's among them
  int64_t k, K;                            // the steps before this sweep, and all steps
  std::vector<int64_t> query_steps;        // after which v has the gradient of the query set
  bool on_query;
  bool grams;            // are those of d wanted where the gradient of the input is not?
  bool own_grams;        // and those of a step with itself, for clipping?
  bool inner;            // are inner products with the gradients g_j wanted?
  const T *c, *along_g;  // [tasks, K], [tasks]: the coefficients c_j and e_k of clipping; null: 1 and 0
  T *scaled, *product;   // scratch

  int64_t rows(const OpPlan& o) const { return tasks[0].rows(o.op.in0); }
  T clip(int64_t g, int64_t j) const { return c ? c[g * K + j] : T(1); }
  // without an adjoint all query sets take turns in the first place
  int64_t query_index() const {
    const auto at = std::find(query_steps.begin(), query_steps.end(), k);
    return at == query_steps.end() ? 0 : at - query_steps.begin();
  }
};

// dst[c] = base[c] + scale * sum_rows (a0 b0 + a1 b1), b null for ones: the gradient of a bias, or of a
// norm's weight
template <class T>
struct ColumnTerm {
  const T* a;
  const T* b;
};
template <class T, int NV, int NP>
FASTMAML_INLINE void column_sums(int64_t rows, int64_t ld, int64_t c, const ColumnTerm<T> (&terms)[NP],
                                 const ParamGrad<T>& g) {
  constexpr int W = lanes<T>;
  Vec<T> acc[NV] = {};
  for (const ColumnTerm<T>& term : terms) {
    const T *a = term.a + c, *b = term.b ? term.b + c : nullptr;
    if (b) {
      for (int64_t r = 0; r < rows; ++r, a += ld, b += ld) FASTMAML_UNROLL(j, NV) {
          acc[j] += load(a + W * j) * load(b + W * j);
        });
    } else {
      for (int64_t r = 0; r < rows; ++r, a += ld) FASTMAML_UNROLL(j, NV) {
          acc[j] += load(a + W * j);
        });
    }
  }
  g.update().template finish<NV>(acc, 0, c, g.dst, 0);
}
template <class T, int NP>
void column_sum(int64_t rows, int64_t columns, int64_t ld, const ColumnTerm<T> (&terms)[NP],
                const ParamGrad<T>& g) {
  column_panels<T>(columns, [&](auto vectors, int64_t c) { column_sums<T, vectors>(rows, ld, c, terms, g); });
}

}  // namespace fastmaml::FASTMAML_ISA
