// The engine without torch, for the sanitizers and for planted faults: values against naive.h, derivatives
// against finite differences. It runs the variant for 16-byte vectors; the others are the same source but for
// a few loads in simd.h, and tests/test_instruction_sets.py runs them.
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <thread>

#include "cpu/request.h"
#include "naive.h"
#include "programs.h"
#include "threads.h"

namespace fastmaml {
void run_generic(const Request&);
}

using namespace fastmaml;
using naive::Vector;

namespace {

std::string now;  // what is being tested

void fail(const std::string& what, double got, double wanted) {
  std::printf("%s: %s: %.12g, not %.12g\n", now.c_str(), what.c_str(), got, wanted);
  std::exit(EXIT_FAILURE);
}

// |got - wanted| <= tolerance * (1 + the largest wanted); not true of NaN
void check(const std::string& what, const Vector& got, const Vector& wanted, double tolerance) {
  if (got.size() != wanted.size()) fail(what + ": size", got.size(), wanted.size());
  double largest = 0;
  for (double a : wanted) largest = std::max(largest, std::abs(a));
  for (std::size_t i = 0; i < got.size(); ++i)
    if (!(std::abs(got[i] - wanted[i]) <= tolerance * (1 + largest)))
      fail(what + " at " + std::to_string(i), got[i], wanted[i]);
}

Vector randoms(int64_t n, double low = -1, double high = 1) {
  static std::mt19937 generator;
  Vector v(n);
  for (double& a : v) a = low + (high - low) * generator() / 4294967296.0;
  return v;
}

Vector part(const Vector& v, int64_t t, int64_t size) {
  return v.empty() ? v : Vector(v.begin() + t * size, v.begin() + (t + 1) * size);
}

double dot(const Vector& a, const Vector& b) {
  return std::inner_product(a.begin(), a.end(), b.begin(), 0.0);
}

enum Wanted { grads = 1, grad_lr = 2, grad_x_s = 4, grad_x_q = 8, all = 15 };

// The inner loop's optimizer; plain descent if not `on`.
struct Sgd {
  bool on = false;
  double momentum = 0, weight_decay = 0, max_norm = std::numeric_limits<double>::infinity();
};

struct Examples {
  int64_t n;
  Vector x, y, weight;  // y: numbers or classes
};

// A call, in double.
struct Call {
  Program program;
  int64_t T, K, S;  // S: 1, params or P
  Examples support, query;
  std::vector<Vector> params;
  Vector lr, seed, grad_loss;
  bool own = false, all_own = false, first_order = false, per_task = false;
  int64_t checkpoint_every = 0;
  int threads = 1, wanted = 0;
  Tail tail = Tail::loss;
  std::vector<char> factored, shared;  // by op; by parameter: is it never a task's own?
  Sgd sgd;
  Vector step_weights;

  bool is_own(std::size_t i) const { return own && (all_own || (i % 2 == 0 && !shared[i])); }
  int64_t size(int64_t buffer) const { return program.buffers[buffer].R * program.buffers[buffer].C; }

  Vector flat(int64_t t) const {  // [P]
    Vector w(program.P);
    for (std::size_t i = 0; i < params.size(); ++i) {
      const int64_t n = program.params[i].O * program.params[i].I;
      const Vector mine = part(params[i], is_own(i) ? t : 0, n);
      std::copy(mine.begin(), mine.end(), w.begin() + program.params[i].offset);
    }
    return w;
  }
  int64_t lr_index(int64_t k, int64_t param, int64_t at) const {
    return k * S + (S == 1 ? 0 : S == program.P ? at : param);
  }
  // f(parameter, place in the flat vector) for every number
  void each(const std::function<void(int64_t, int64_t)>& f) const {
    for (std::size_t i = 0; i < params.size(); ++i)
      for (int64_t j = 0; j < program.params[i].O * program.params[i].I; ++j)
        f(static_cast<int64_t>(i), program.params[i].offset + j);
  }
};

struct Results {
  Vector out, loss, grads, grad_lr, grad_x_s, grad_x_q;
};

// Everything is allocated at its exact size, so that ASan sees what reads or writes past it, and the outputs
// are NaN before.
template <class S = double>
Results run(const Call& c) {
  std::vector<std::vector<S>> numbers;
  std::vector<std::vector<int64_t>> classes;
  auto input = [&](const Vector& v) -> const void* {
    numbers.emplace_back(v.begin(), v.end());
    return v.empty() ? nullptr : numbers.back().data();
  };
  auto set = [&](const Examples& e) {
    Set s{input(e.x), nullptr, input(e.weight), e.n};
    if (c.program.loss == Loss::mse) return s.target = input(e.y), s;
    classes.emplace_back(e.y.begin(), e.y.end());
    return s.target = classes.back().data(), s;
  };
  Request q;
  q.program = &c.program, q.is_double = sizeof(S) == 8, q.tail = c.tail, q.T = c.T, q.K = c.K, q.S = c.S;
  q.checkpoint_every = c.checkpoint_every, q.first_order = c.first_order, q.per_task = c.per_task;
  q.factored = c.factored;
  q.plain = !c.sgd.on, q.momentum = c.sgd.momentum, q.weight_decay = c.sgd.weight_decay;
  q.max_norm = c.sgd.max_norm;
  if (c.tail == Tail::loss && c.K > 0) q.step_weights = c.step_weights;
  q.threads = c.threads, q.lr = input(c.lr), q.support = set(c.support), q.query = set(c.query);
  for (std::size_t i = 0; i < c.params.size(); ++i)
    q.params.push_back(input(c.params[i])), q.own.push_back(c.is_own(i));

  std::vector<S> outputs[6];
  auto output = [&](int i, bool wanted, int64_t size) -> void* {
    if (wanted) outputs[i].assign(size, std::numeric_limits<S>::quiet_NaN());
    return wanted ? outputs[i].data() : nullptr;
  };
  const int64_t rows = c.per_task ? c.T : 1, out_size = c.T * c.query.n * c.size(c.program.output);
  const bool steps = c.K > 0, query = c.tail != Tail::weights, loss = query && c.tail != Tail::output;
  q.out = output(0, !loss, query ? out_size : c.T * c.program.P);
  q.loss = output(1, loss, c.T);
  q.grads = output(2, c.wanted & grads, rows * c.program.P);
  q.grad_lr = output(3, c.wanted & grad_lr && steps, rows * c.K * c.S);
  q.grad_x_s = output(4, c.wanted & grad_x_s && steps, c.support.x.size());
  q.grad_x_q = output(5, c.wanted & grad_x_q && query, c.query.x.size());
  if (c.wanted || c.tail == Tail::curvature) q.seed = input(c.seed), q.grad_loss = input(c.grad_loss);
  run_generic(q);
  auto result = [&](int i) { return Vector(outputs[i].begin(), outputs[i].end()); };
  return {result(0), result(1), result(2), result(3), result(4), result(5)};
}

// [T]: the numbers whose derivatives a call gives
Vector objective(Call c) {
  Vector value(c.T);
  const bool curvature = c.tail == Tail::curvature;
  if (curvature) c.tail = Tail::loss, c.per_task = true;
  c.wanted = curvature ? grads : 0;
  const Results r = run(c);
  const Vector& f = c.tail == Tail::loss ? r.grads : r.out;
  for (int64_t t = 0; t < c.T; ++t) {
    if (c.tail == Tail::loss) value[t] = (curvature ? c.grad_loss[t] : 1) * r.loss[t];
    if (!f.empty()) value[t] += dot(part(f, t, f.size() / c.T), part(c.seed, t, f.size() / c.T));
  }
  return value;
}

// The numbers of one kind in a call, and those of a task in the order of its gradient.
struct Group {
  const char* name;
  std::vector<Vector*> (*numbers)(Call&);
  Vector (*of_task)(const Call&, int64_t t);
  Vector Results::*grad;
};

std::vector<Vector*> all_params(Call& c) {
  std::vector<Vector*> v;
  for (Vector& param : c.params) v.push_back(&param);
  return v;
}
const Group groups[] = {
    {"params", all_params, [](const Call& c, int64_t t) { return c.flat(t); }, &Results::grads},
    {"lr", [](Call& c) { return std::vector<Vector*>{&c.lr}; }, [](const Call& c, int64_t) { return c.lr; },
     &Results::grad_lr},
    {"support x", [](Call& c) { return std::vector<Vector*>{&c.support.x}; },
     [](const Call& c, int64_t t) { return part(c.support.x, t, c.support.x.size() / c.T); },
     &Results::grad_x_s},
    {"query x", [](Call& c) { return std::vector<Vector*>{&c.query.x}; },
     [](const Call& c, int64_t t) { return part(c.query.x, t, c.query.x.size() / c.T); }, &Results::grad_x_q},
};

// Along a random direction.
void check_derivative(const Call& c, const Group& group, const Vector& grad) {
  const double h = 1e-5;
  Call direction = c, up = c, down = c;
  for (Vector* v : group.numbers(direction)) *v = randoms(v->size());
  for (std::size_t i = 0; i < group.numbers(up).size(); ++i)
    for (std::size_t j = 0; j < group.numbers(up)[i]->size(); ++j) {
      (*group.numbers(up)[i])[j] += h * (*group.numbers(direction)[i])[j];
      (*group.numbers(down)[i])[j] -= h * (*group.numbers(direction)[i])[j];
    }
  const int64_t size = group.of_task(c, 0).size();
  if (size == 0) return;
  const int64_t rows = grad.size() / size;  // the tasks, or 1 for their sum
  const Vector f_up = objective(up), f_down = objective(down);
  Vector got(rows), wanted(rows);
  for (int64_t t = 0; t < c.T; ++t) wanted[rows == 1 ? 0 : t] += (f_up[t] - f_down[t]) / (2 * h);
  for (int64_t t = 0; t < rows; ++t) got[t] = dot(part(grad, t, size), group.of_task(direction, t));
  check(std::string("derivative by ") + group.name, got, wanted, 1e-6);
}

void check_same(const std::string& what, const Results& got, const Results& wanted, double tolerance) {
  check(what + ": out", got.out, wanted.out, tolerance);
  check(what + ": loss", got.loss, wanted.loss, tolerance);
  for (const Group& g : groups)
    if (!(got.*g.grad).empty())
      check(what + ": gradient by " + g.name, got.*g.grad, wanted.*g.grad, tolerance);
}

// [W_0, .., W_K] of a task by naive.h: gradients are finite differences.
std::vector<Vector> adapted(const Call& c, int64_t t) {
  const double h = 1e-5;
  std::vector<Vector> trajectory = {c.flat(t)};
  Vector m(c.program.P);
  for (int64_t k = 0; k < c.K; ++k) {
    Vector w = trajectory.back(), g(c.program.P);
    auto loss = [&] {
      const int64_t n = c.support.n;
      return naive::loss(c.program, naive::output(c.program, w, part(c.support.x, t, n * c.size(0)), n),
                         part(c.support.y, t, c.support.y.size() / c.T), part(c.support.weight, t, n), n);
    };
    c.each([&](int64_t param, int64_t at) {
      if (!c.program.params[param].adapt) return;
      const double old = std::exchange(w[at], w[at] + h), up = loss();
      w[at] = old - h;
      g[at] = (up - loss()) / (2 * h);
      w[at] = old;
    });
    const double clip = std::min(1.0, c.sgd.max_norm / (std::sqrt(dot(g, g)) + 1e-6));
    Vector next = w;
    c.each([&](int64_t param, int64_t at) {
      if (!c.program.params[param].adapt) return;
      m[at] = c.sgd.momentum * m[at] + clip * g[at] + c.sgd.weight_decay * w[at];
      next[at] -= c.lr[c.lr_index(k, param, at)] * m[at];
    });
    trajectory.push_back(next);
  }
  return trajectory;
}

// What the call's tail gives out of the W_k [T, K + 1, P].
void check_values(const Call& c, const std::vector<std::vector<Vector>>& weights, const Results& got) {
  Vector out, loss;
  for (int64_t t = 0; t < c.T; ++t) {
    const int64_t n = c.query.n;
    double total = 0;
    for (int64_t k = 0; k <= c.K; ++k) {
      const bool every = !c.step_weights.empty() && c.K > 0;
      const double weight = every ? (k > 0 ? c.step_weights[k - 1] : 0) : k == c.K;
      const Vector z = naive::output(c.program, weights[t][k], part(c.query.x, t, n * c.size(0)), n);
      const Vector& o = c.tail == Tail::weights ? weights[t][k] : z;
      if (k == c.K) out.insert(out.end(), o.begin(), o.end());
      total += weight * naive::loss(c.program, z, part(c.query.y, t, c.query.y.size() / c.T),
                                    part(c.query.weight, t, n), n);
    }
    loss.push_back(total);
  }
  if (c.tail == Tail::weights || c.tail == Tail::output)
    check("out", got.out, out, 1e-8);
  else
    check("loss", got.loss, loss, 1e-8);
}

// Every gradient of the query loss is carried to theta unchanged, from the W_k where it counts; and
// g_k = (W_k - W_{k+1}) / a_k.
void check_first_order(Call c) {
  c.first_order = c.per_task = true;
  const Results got = run(c);
  const int64_t K = c.K;
  std::vector<Vector> weights;  // [K + 1] of [T, P]
  c.tail = Tail::weights, c.wanted = 0;
  c.factored.clear();
  for (c.K = 0; c.K <= K; ++c.K) weights.push_back(run(c).out);
  Results wanted{{}, got.loss, Vector(c.T * c.program.P), Vector(c.T * K * c.S), Vector(got.grad_x_s.size()),
                 {}};
  for (int64_t k = K; k >= 0; --k) {
    const double weight = c.step_weights.empty() || K == 0 ? k == K : k > 0 ? c.step_weights[k - 1] : 0;
    Call there = c;
    there.tail = Tail::loss, there.K = 0, there.own = there.all_own = true, there.wanted = grads;
    for (std::size_t i = 0; i < c.params.size(); ++i) {
      there.params[i].clear();
      for (int64_t t = 0; t < c.T; ++t) {
        const auto at = weights[k].begin() + t * c.program.P + c.program.params[i].offset;
        there.params[i].insert(there.params[i].end(), at, at + c.program.params[i].O * c.program.params[i].I);
      }
    }
    const Vector g = run(there).grads;
    for (std::size_t j = 0; j < g.size(); ++j) wanted.grads[j] += weight * g[j];
    for (int64_t t = 0; t < c.T && k > 0; ++t)
      c.each([&](int64_t param, int64_t at) {
        const int64_t j = t * c.program.P + at, i = c.lr_index(k - 1, param, at);
        wanted.grad_lr[t * K * c.S + i] += wanted.grads[j] * (weights[k][j] - weights[k - 1][j]) / c.lr[i];
      });
  }
  wanted.grad_x_q = got.grad_x_q;
  check_same("first order", got, wanted, 1e-10);
  Call alone = c;  // the gradient by the parameters alone keeps less
  alone.K = K, alone.tail = Tail::loss, alone.wanted = grads;
  Results less{{}, got.loss, wanted.grads, {}, {}, {}};
  check_same("first order alone", run(alone), less, 1e-10);
}

// The same results in other ways: threads, checkpoints, fewer outputs, another dtype, two callers.
void check_variants(Call c, const Results& full) {
  const std::string tail = "tail " + std::to_string(int(c.tail)) + ", ";
  auto compare = [&](const std::string& what, const Call& other, double tolerance) {
    check_same(tail + what, run(other), full, tolerance);
  };
#ifndef FASTMAML_DOUBLE_ALONE  // as with engine_of_doubles.cpp
  check_same(tail + "float", run<float>(c), full, 1e-4);
#endif
  for (int64_t every : {1, 2}) {
    Call other = c;
    other.checkpoint_every = every;
    compare("checkpoints", other, 1e-12);
  }
  for (int wanted : {grads, grad_lr, grad_x_s, grad_x_q}) {
    Call other = c;
    other.wanted = wanted;
    compare("output " + std::to_string(wanted) + " alone", other, 1e-12);
  }
  c.threads = 3;
  compare("threads", c, 0);
  Results two[2];
  std::thread callers[2];
  for (int i = 0; i < 2; ++i) callers[i] = std::thread([&, i] { two[i] = run(c); });
  for (std::thread& caller : callers) caller.join();
  for (const Results& r : two) check_same(tail + "concurrent calls", r, full, 0);
}

struct Case {
  const char* name;
  Program program;
  Loss loss;
  int64_t T, N, Q, K;
  enum { scalar, per_tensor, per_element } lr;
  bool own = false, weighted = false;
  double label_smoothing = 0;
  std::vector<std::size_t> factored = {};  // which of the linear layers
  Sgd sgd = {};
  Vector step_weights = {};
};

Call make_call(const Case& a) {
  Call c;
  c.program = a.program, c.program.loss = a.loss, c.program.label_smoothing = a.label_smoothing;
  static int64_t programs = 0;
  c.program.number = ++programs;  // so that the plan is found again in most calls
  c.T = a.T, c.K = a.K, c.own = c.per_task = a.own, c.sgd = a.sgd, c.step_weights = a.step_weights;
  if (!a.factored.empty()) c.factored.resize(a.program.ops.size());
  c.shared.resize(a.program.params.size());
  for (std::size_t i = 0, linear = 0; i < a.program.ops.size(); ++i) {
    if (a.program.ops[i].kind != Kind::linear) continue;
    if (std::count(a.factored.begin(), a.factored.end(), linear++))
      c.factored[i] = c.shared[a.program.ops[i].w] = 1;
  }
  for (std::size_t i = 0; i < a.program.params.size(); ++i) {
    const Param& p = a.program.params[i];
    c.params.push_back(randoms((c.is_own(i) ? a.T : 1) * p.O * p.I));
  }
  c.S = a.lr == Case::scalar ? 1 : a.lr == Case::per_tensor ? c.params.size() : a.program.P;
  c.lr = randoms(a.K * c.S, 0.05, 0.2);
  auto examples = [&](int64_t n) {
    const bool mse = a.loss == Loss::mse;
    const int64_t out = c.size(a.program.output);
    Examples e{n, randoms(a.T * n * c.size(0)), mse ? randoms(a.T * n * out) : randoms(a.T * n, 0, out), {}};
    if (!mse)
      for (double& y : e.y) y = std::floor(y);
    if (a.weighted) e.weight = randoms(a.T * n, 0.1, 1);
    return e;
  };
  c.support = examples(a.N), c.query = examples(a.Q);
  c.grad_loss = randoms(a.T);
  return c;
}

void check_case(const Case& a) {
  now = a.name;
  Call c = make_call(a);
  std::vector<std::vector<Vector>> weights;
  for (int64_t t = 0; t < a.T; ++t) weights.push_back(adapted(c, t));
  for (Tail tail : {Tail::weights, Tail::output, Tail::loss, Tail::curvature}) {
    // these have dense weights or their tangents
    if (!a.factored.empty() && (tail == Tail::weights || tail == Tail::curvature)) continue;
    if (tail == Tail::curvature) c.K = 0;
    c.tail = tail;
    c.seed = randoms(a.T * (tail == Tail::output ? a.Q * c.size(a.program.output) : a.program.P));
    c.wanted = all;
    const Results full = run(c);
    if (tail != Tail::curvature) check_values(c, weights, full);
    if (!a.factored.empty()) {
      Call dense = c;
      dense.factored.clear();
      check_same("dense", run(dense), full, 1e-11);
      Call first = c;
      first.first_order = dense.first_order = true;
      check_same("dense, first order", run(dense), run(first), 1e-11);
    }
    for (const Group& g : groups)
      if (!(full.*g.grad).empty()) check_derivative(c, g, full.*g.grad);
    check_variants(c, full);
    if (tail == Tail::loss && !c.sgd.on) check_first_order(c);
  }
}

}  // namespace

int main() {
  const Loss mse = Loss::mse, cross_entropy = Loss::cross_entropy;
  const Case cases[] = {
      {"mlp", programs::mlp(2), mse, 2, 3, 5, 3, Case::scalar},
      {"mlp, one output", programs::mlp(1), mse, 3, 7, 1, 2, Case::per_tensor, false, true},
      {"mlp, one example of one task", programs::mlp(5), cross_entropy, 1, 1, 1, 1, Case::scalar},
      {"mlp, no steps", programs::mlp(3), cross_entropy, 2, 0, 3, 0, Case::scalar},
      {"mlp, own parameters", programs::mlp(3), cross_entropy, 2, 5, 4, 2, Case::per_element, true, true},
      {"wide", programs::wide(), cross_entropy, 1, 2, 3, 2, Case::per_element, false, true, 0.1},
      {"norms", programs::norms(3), cross_entropy, 2, 3, 5, 3, Case::per_tensor, false, false, 0.1},
      {"norms, own parameters", programs::norms(1), mse, 3, 5, 3, 1, Case::scalar, true},
      {"no eps", programs::no_eps(), mse, 2, 6, 5, 2, Case::scalar},
      {"chain", programs::chain(), cross_entropy, 2, 3, 2, 2, Case::scalar, false, true},
      {"gates", programs::gates(), mse, 2, 3, 4, 3, Case::scalar},
      {"columns", programs::columns(), mse, 3, 6, 7, 2, Case::scalar},
      {"many rows", programs::many_rows(), mse, 1, 3, 3, 1, Case::scalar},
      {"fan", programs::fan(), mse, 2, 3, 4, 2, Case::scalar, false, true},
      {"tied", programs::tied(false), cross_entropy, 2, 3, 2, 3, Case::scalar},
      {"tied, some frozen", programs::tied(true), cross_entropy, 2, 3, 2, 3, Case::scalar},
      {"tied, per tensor", programs::tied(true), mse, 2, 3, 2, 3, Case::per_tensor, true},
      {"tied, per element", programs::tied(true), mse, 1, 4, 2, 2, Case::per_element},
      {"many tasks", programs::tiny(), mse, 67, 2, 1, 2, Case::scalar},
      {"tied, many tasks", programs::tied(false), mse, 65, 2, 1, 1, Case::scalar},
      {"no parameters", programs::no_parameters(), cross_entropy, 2, 2, 3, 1, Case::scalar},
      {"factored", programs::mlp(2), mse, 3, 3, 5, 3, Case::scalar, false, false, 0, {0, 1, 2}},
      {"factored, per tensor",
       programs::mlp(3),
       cross_entropy,
       5,
       2,
       3,
       2,
       Case::per_tensor,
       false,
       true,
       0.1,
       {1}},
      {"factored first layer", programs::mlp(2), mse, 4, 3, 2, 3, Case::per_tensor, false, false, 0, {0}},
      {"factored, own parameters",
       programs::mlp(3),
       cross_entropy,
       3,
       4,
       2,
       2,
       Case::scalar,
       true,
       true,
       0,
       {0, 1}},
      {"factored, no steps", programs::mlp(3), mse, 3, 0, 3, 0, Case::scalar, false, false, 0, {0, 2}},
      {"factored norms",
       programs::norms(3),
       cross_entropy,
       3,
       3,
       5,
       3,
       Case::per_tensor,
       false,
       false,
       0,
       {0, 1, 3}},
      {"factored chain", programs::chain(), mse, 2, 2, 3, 2, Case::scalar, false, false, 0, {0, 1}},
      {"factored fan", programs::fan(), mse, 2, 3, 5, 1, Case::scalar, false, true, 0, {0, 1, 2, 4, 5}},
      {"factored, some tied or frozen",
       programs::tied(true),
       mse,
       3,
       3,
       2,
       3,
       Case::per_tensor,
       true,
       false,
       0,
       {2, 3}},
      {"factored, long rows",
       programs::long_rows(),
       mse,
       1,
       2,
       3,
       1,
       Case::scalar,
       false,
       false,
       0,
       {0, 1, 2}},
      {"factored rows", programs::many_rows(), mse, 1, 2, 3, 1, Case::scalar, false, false, 0, {0, 1, 2}},
      {"factored, rounds", programs::mlp(2), mse, 24, 80, 1, 2, Case::scalar, false, false, 0, {0, 1, 2}},
      {"factored, many tasks", programs::tiny(), mse, 203, 2, 1, 2, Case::scalar, false, false, 0, {0}},
      {"momentum", programs::mlp(2), mse, 2, 3, 5, 4, Case::scalar, false, false, 0, {}, {true, 0.9}},
      {"weight decay",
       programs::norms(1),
       mse,
       2,
       3,
       5,
       2,
       Case::per_tensor,
       false,
       true,
       0,
       {},
       {true, 0, 0.3}},
      {"clipped", programs::gates(), mse, 3, 3, 4, 3, Case::scalar, false, false, 0, {}, {true, 0, 0, 0.7}},
      {"wide, clipped",
       programs::wide(),
       mse,
       2,
       3,
       4,
       3,
       Case::scalar,
       false,
       false,
       0,
       {},
       {true, 0.5, 0, 0.7}},
      {"losses on every step",
       programs::mlp(3),
       cross_entropy,
       2,
       3,
       4,
       3,
       Case::scalar,
       false,
       true,
       0,
       {},
       {},
       {0.5, 0, 2}},
      {"all of it",
       programs::tied(true),
       mse,
       3,
       3,
       2,
       4,
       Case::per_element,
       false,
       false,
       0,
       {},
       {true, 0.5, 0.2, 0.5},
       {1, 0.5, 0.25, 0}},
      {"factored, momentum",
       programs::mlp(2),
       mse,
       3,
       3,
       5,
       4,
       Case::per_tensor,
       false,
       false,
       0,
       {0, 1, 2},
       {true, 0.9}},
      {"factored, weight decay",
       programs::mlp(3),
       cross_entropy,
       3,
       2,
       3,
       3,
       Case::per_tensor,
       false,
       true,
       0,
       {0, 1, 2},
       {true, 0.7, 0.3}},
      {"factored, clipped",
       programs::norms(3),
       cross_entropy,
       3,
       3,
       5,
       3,
       Case::per_tensor,
       false,
       false,
       0.1,
       {0, 1, 3},
       {true, 0.5, 0, 0.4}},
      {"wide, clipped, factored in part",
       programs::wide(),
       cross_entropy,
       2,
       3,
       4,
       3,
       Case::per_tensor,
       false,
       false,
       0,
       {1},
       {true, 0, 0.1, 0.7}},
      {"wider, clipped, factored",
       programs::wider(),
       cross_entropy,
       2,
       3,
       4,
       3,
       Case::per_tensor,
       false,
       false,
       0,
       {0, 1},
       {true, 0, 0.1, 0.7}},
      {"wider, clipped, first layer factored",
       programs::wider(),
       cross_entropy,
       2,
       3,
       4,
       3,
       Case::per_tensor,
       false,
       false,
       0,
       {0},
       {true, 0, 0.1, 0.7}},
      {"factored, losses on every step",
       programs::mlp(3),
       mse,
       3,
       3,
       4,
       4,
       Case::scalar,
       false,
       true,
       0,
       {0, 1, 2},
       {},
       {0.5, 0, 2, 1}},
      {"factored fan, all of it",
       programs::fan(),
       mse,
       2,
       3,
       5,
       3,
       Case::per_tensor,
       false,
       true,
       0,
       {0, 1, 2, 4, 5},
       {true, 0.5, 0.2, 0.5},
       {1, 0.5, 0.25}},
      {"factored first layer, all of it",
       programs::mlp(2),
       mse,
       4,
       3,
       2,
       3,
       Case::scalar,
       false,
       false,
       0,
       {0},
       {true, 0.5, 0.2, 0.5},
       {1, 0, 0}},
      {"factored, some frozen, all of it",
       programs::tied(true),
       mse,
       3,
       3,
       2,
       4,
       Case::per_tensor,
       true,
       false,
       0,
       {2, 3},
       {true, 0.5, 0.2, 0.5},
       {1, 0.5, 0.25, 0}},
  };
  for (const Case& a : cases) check_case(a);
  std::printf("%zu programs, every derivative right\n", std::size(cases));
}
