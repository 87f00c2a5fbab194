// The ops of csrc/cpu one at a time, for one task, by a C interface: tests/test_sweep_cpp.py drives them with
// the sweep of the Triton kernels. Matrices and rows are dense here; the engine's own padding is made and
// removed.
#define FASTMAML_ISA generic
#define FASTMAML_VECTOR_BYTES 16
#include "cpu/inner_loop.h"

using namespace fastmaml;
using namespace fastmaml::generic;

namespace {

using Numbers = std::vector<double>;

void copy_rows(int64_t rows, int64_t width, const double* from, int64_t ld_from, double* to, int64_t ld_to) {
  for (int64_t r = 0; from && to && r < rows; ++r) std::copy_n(from + r * ld_from, width, to + r * ld_to);
}

// between a dense [O, I] or [O] and its slot
void copy_param(const Slot& s, const double* dense, double* slot, double* dense_out = nullptr) {
  for (int64_t r = 0; r < s.rows; ++r)
    for (int64_t c = 0; c < s.cols; ++c) {
      const int64_t at = s.wide ? c * s.rows + r : r * s.cols + c;
      if (dense) slot[s.offset + r * s.ld + c] = dense[at];
      if (dense_out) dense_out[at] = slot[s.offset + r * s.ld + c];
    }
}

struct Buffers {
  Numbers x, primal, tangent, w, t_w, grads;
  Pass<double> pass;

  Buffers(const Plan& plan, const Places& places)
      : x(places.n * plan.ld[0]),
        primal(plan.frame_size(places.n, 1)),
        tangent(primal.size()),
        w(plan.P),
        t_w(plan.P),
        grads(plan.P),
        pass{plan,
             places.n,
             places.of(0),
             x.data(),
             carve_frame(plan, places, 0, primal.data()),
             carve_frame(plan, places, 0, tangent.data()),
             w.data()} {
    pass.t_w = t_w.data(), pass.grad_dst = grads.data();
    pass.x_grad = true;
  }
};

}  // namespace

// Null: not there. With `dual` the outputs are tangents.
struct Task {
  const double *x, *w, *b, *grad_y;  // [M, I], [O, I] or [O], [O], [M, O]
  const double *t_x, *t_w, *t_b, *t_grad_y;
  double *y, *grad_x, *grad_w, *grad_b;
};

extern "C" void op_task(int64_t kind, double attr, int64_t M, int64_t I, int64_t O, int forward, int dual,
                        const Task* a) {
  Program program;
  program.buffers = {{1, I}, {1, O}};
  const bool matrix = Kind(kind) == Kind::linear;
  if (a->w) program.params.push_back({O, matrix ? I : 1, matrix, true, 0});
  if (a->b) program.params.push_back({O, 1, false, true, 0});
  const int64_t b = a->b ? int64_t(program.params.size()) - 1 : -1;
  program.ops = {{Kind(kind), 0, -1, 1, a->w ? 0 : -1, b, false, false, attr, 0, 0}};
  program.output = 1;
  const Plan plan = make_plan(program, lanes<double>, 8, {}, true);
  OpPlan o = plan.ops[0];
  o.tangent_in0 = a->t_x;
  const Places places(plan, M, 1);
  Buffers buffers(plan, places);
  const Pass<double>& p = buffers.pass;
  copy_rows(M, I, a->x, I, buffers.x.data(), p.ld(0));
  copy_rows(M, I, a->t_x, I, p.t_value(0), p.ld(0));
  copy_rows(M, O, a->grad_y, O, p.grad(1), p.ld(1));
  copy_rows(M, O, a->t_grad_y, O, p.t_grad(1), p.ld(1));
  if (a->w) copy_param(plan.slots[0], a->w, buffers.w.data());
  if (a->w) copy_param(plan.slots[0], a->t_w, buffers.t_w.data());
  if (a->b) copy_param(plan.slots[b], a->b, buffers.w.data());
  if (a->b) copy_param(plan.slots[b], a->t_b, buffers.t_w.data());

  run_op<false, true>(o, p);
  if (dual) run_op<true, true>(o, p);
  copy_rows(M, O, dual ? p.t_value(1) : p.out(1), p.ld(1), a->y, O);
  if (forward) return;
  dual ? run_op<true, false>(o, p) : run_op<false, false>(o, p);
  copy_rows(M, I, dual ? p.t_grad(0) : p.grad(0), p.ld(0), a->grad_x, I);
  if (a->w) copy_param(plan.slots[0], nullptr, buffers.grads.data(), a->grad_w);
  if (a->b) copy_param(plan.slots[b], nullptr, buffers.grads.data(), a->grad_b);
}

// The loss, and to `out` [N, C] its gradient by z or the tangent of that.
extern "C" double mse_task(int64_t N, int64_t C, int dual, const double* z, const double* t_z,
                           const double* target, double* out) {
  Program program;
  program.buffers = {{1, C}};
  const Plan plan = make_plan(program, lanes<double>, 8);
  const Places places(plan, N, 1);
  Buffers buffers(plan, places);
  const Pass<double>& p = buffers.pass;
  copy_rows(N, C, z, C, buffers.x.data(), p.ld(0));
  copy_rows(N, C, t_z, C, p.t_value(0), p.ld(0));
  const double loss = dual ? mse<true, double>(p, target, nullptr) : mse<false, double>(p, target, nullptr);
  copy_rows(N, C, dual ? p.t_grad(0) : p.grad(0), p.ld(0), out, C);
  return loss;
}
