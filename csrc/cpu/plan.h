// Where everything lies: the same for every task and for every call of a kind.
#pragma once
#include <algorithm>
#include <utility>

#include "../program.h"

namespace fastmaml {

inline int64_t round_up(int64_t n, int64_t m) { return (n + m - 1) / m * m; }

// The distance of rows of `width` numbers. Where it is a multiple of a large power of two they would share a
// few sets of the cache: such lie a line further apart.
inline int64_t apart(int64_t width, int64_t power, int64_t line) {
  return width % power == 0 ? width + line : width;
}

// A parameter inside the kernels: rows of `cols` numbers, zeros up to `width`, a whole number of vectors, and
// `ld` from row to row. A matrix lies as [I, O] (`wide`) or as [O, I], whichever pads less, so that a layer
// with one output does not compute a whole vector.
struct Slot {
  int64_t rows, cols, width, ld, offset;
  int64_t block;  // rows that are read at once where two products read them: the second finds them in L2
  bool wide;
  int uses;
  int64_t size() const { return rows * ld; }
};

// How a linear layer's fast weights are held: as a matrix for each task, or as theta and the rows that the
// steps leave (factored.h); `fixed_input` where these are the rows of x in every step.
enum class Form { dense, factored, fixed_input };

struct OpPlan {
  Op op;
  Form form;
  bool tangent_in0, tangent_in1, tangent_out;  // does the buffer move with the parameters?
  bool first_in0, first_in1;                   // first to write this buffer's gradient in the backward pass
  bool first_w, first_b;                       // first to write this parameter's gradient
  int64_t saved_each, saved_fixed;             // floats kept for the backward pass, per example and once
  int64_t saved_each_before, saved_fixed_before;
};

struct Plan {
  Program program;
  int64_t lanes;                // of a vector register
  std::vector<int64_t> ld;      // from row to row of a buffer
  std::vector<int64_t> before;  // padded floats per example of the buffers before this one
  std::vector<char> tangent;    // per buffer
  std::vector<Slot> slots;
  std::vector<OpPlan> ops;
  int64_t P = 0;  // floats of all slots
  int64_t per_example = 0, saved_each = 0, saved_fixed = 0;
  bool tied = false, frozen = false;
  bool x_in_frames = false;  // have frames room for buffer 0? x lies elsewhere, few calls want its gradient
  bool factored = false;     // is any layer
  bool side_by_side =
      false;  // have tasks to run so, for a product of all of them with one theta in each step?

  int64_t saved_size(int64_t n) const { return n * saved_each + saved_fixed; }
  int64_t frame_size(int64_t n, int64_t tasks) const {
    return round_up(tasks * (2 * n * per_example + saved_size(n)), 16);
  }
};

// Where the buffers of `tasks` tasks lie in a frame: a buffer of all tasks is one matrix.
struct Places {
  int64_t n, tasks, buffers;
  std::vector<int64_t> at;  // [tasks, buffers]

  Places(const Plan& plan, int64_t n, int64_t tasks) : n(n), tasks(tasks), buffers(plan.ld.size()) {
    at.reserve(tasks * buffers);
    for (int64_t task = 0; task < tasks; ++task)
      for (std::size_t b = 0; b < plan.ld.size(); ++b)
        at.push_back(n * (tasks * plan.before[b] + task * plan.program.buffers[b].R * plan.ld[b]));
  }
  const int64_t* of(int64_t task) const { return at.data() + task * buffers; }
};

// lanes: of a vector; line: numbers in a cache line of 64 bytes; factored: for each op, empty for none;
// x_grad: is the gradient of x wanted?
inline Plan make_plan(Program program, int64_t lanes, int64_t line, const std::vector<char>& factored = {},
                      bool x_grad = false) {
  Plan plan;
  plan.lanes = lanes;
  std::vector<char> no_matrix(program.params.size(), 0);
  for (std::size_t i = 0; i < factored.size(); ++i)
    if (factored[i]) no_matrix[program.ops[i].w] = 1;
  plan.x_in_frames = x_grad || program.output == 0;
  for (const Buffer& b : program.buffers) {
    plan.ld.push_back(apart(round_up(b.C, lanes), 8 * 2 * line, line));
    plan.before.push_back(plan.per_example);
    if (plan.before.size() > 1 || plan.x_in_frames) plan.per_example += b.R * plan.ld.back();
  }
  for (const Param& p : program.params) {
    Slot s{};
    s.wide = !p.matrix || round_up(p.O, lanes) * p.I <= round_up(p.I, lanes) * p.O;
    if (!no_matrix[plan.slots.size()]) {
      s.rows = s.wide ? p.I : p.O;
      s.cols = s.wide ? p.O : p.I;
    }
    s.width = round_up(s.cols, lanes);
    s.ld = s.rows > 1 ? apart(s.width, 8 * line, line) : s.width;
    s.block =
        s.wide && s.rows > 0 ? std::max<int64_t>((64 << 10) / (s.ld * 64 / line) / 16 * 16, 16) : s.rows;
    s.offset = plan.P;
    plan.P += round_up(s.size(), 16);
    plan.slots.push_back(s);
    plan.frozen |= !p.adapt;
  }
  plan.tangent.assign(program.buffers.size(), 0);
  for (const Op& op : program.ops) {
    OpPlan o{};
    o.op = op;
    o.tangent_in0 = plan.tangent[op.in0];
    o.tangent_in1 = op.in1 >= 0 && plan.tangent[op.in1];
    o.tangent_out = o.tangent_in0 || o.tangent_in1 || op.w >= 0 || op.b >= 0;
    plan.tangent[op.out] = o.tangent_out;
    if (!factored.empty() && factored[plan.ops.size()]) {
      o.form = op.in0 == 0 && !x_grad ? Form::fixed_input : Form::factored;
      plan.factored = true;
      plan.side_by_side |= o.form == Form::factored;
    }
    const Buffer& in = program.buffers[op.in0];
    const int64_t ld = plan.ld[op.in0];
    if (op.kind == Kind::batch_norm) o.saved_each = ld, o.saved_fixed = ld;  // h [N, C]; r [C]
    if (op.kind == Kind::layer_norm) o.saved_each = in.R * (ld + lanes);     // h [N, C]; r [N]
    o.saved_each_before = plan.saved_each, o.saved_fixed_before = plan.saved_fixed;
    plan.saved_each += o.saved_each, plan.saved_fixed += o.saved_fixed;
    plan.ops.push_back(o);
  }
  std::vector<char> written(program.buffers.size(), 0);
  for (auto o = plan.ops.rbegin(); o != plan.ops.rend(); ++o) {
    auto first = [&](int64_t b) { return b >= 0 && !std::exchange(written[b], 1); };
    auto first_param = [&](int64_t p) { return p >= 0 && plan.slots[p].uses++ == 0; };
    o->first_in0 = first(o->op.in0);
    o->first_in1 = first(o->op.in1);
    o->first_w = first_param(o->op.w);
    o->first_b = first_param(o->op.b);
  }
  for (const Slot& s : plan.slots) plan.tied |= s.uses > 1;
  plan.program = std::move(program);
  return plan;
}

// The same, kept until this thread's next call: a training step asks for one plan every time, and a plan that
// is made anew has to reach the caches of all threads again.
inline const Plan& plan_for(const Program& program, int64_t lanes, int64_t line,
                            const std::vector<char>& factored, bool x_grad) {
  thread_local Plan plan;
  thread_local std::vector<char> of_factored;
  thread_local bool of_x_grad = false;
  const bool known = program.number > 0 && program.number == plan.program.number && lanes == plan.lanes &&
                     factored == of_factored && x_grad == of_x_grad;
  if (!known)
    plan = make_plan(program, lanes, line, factored, x_grad), of_factored = factored, of_x_grad = x_grad;
  return plan;
}

}  // namespace fastmaml
