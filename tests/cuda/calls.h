// What the tests of the CUDA kernels share: calls of every kind with random data, run by the kernels, on the
// host, and by the engine of csrc/cpu (whose own tests are tests/cpp). After cuda/emulation/device.h, with
// FASTMAML_CLUSTER as in csrc/cuda/table.h.
#pragma once
#include <cstdio>
#include <limits>

#include "../cpp/programs.h"
#include "../cpp/threads.h"
#include "cpu/request.h"
#include "cuda/plan.h"
#include "cuda/run.h"

namespace fastmaml {
void run_generic(const Request&);
}

using namespace fastmaml;
using Vector = std::vector<double>;

namespace {

std::string now;  // what is being tested

[[noreturn]] void fail(const std::string& what, double got, double wanted) {
  std::printf("%s: %s: %.12g, not %.12g\n", now.c_str(), what.c_str(), got, wanted);
  std::exit(EXIT_FAILURE);
}

void check(const char* what, const Vector& got, const Vector& wanted, double bound) {
  double largest = 0;
  for (double a : wanted) largest = std::max(largest, std::abs(a));
  for (std::size_t i = 0; i < got.size(); ++i)
    if (!(std::abs(got[i] - wanted[i]) <= bound * (1 + largest)))  // not true of NaN
      fail(std::string(what) + " at " + std::to_string(i), got[i], wanted[i]);
}

std::mt19937 generator;

Vector randoms(int64_t n, double low = -1, double high = 1) {
  Vector v(n);
  for (double& a : v) a = low + (high - low) * generator() / 4294967296.0;
  return v;
}

struct How {
  const char* name;
  Tail tail = Tail::loss;
  int64_t K = 3, checkpoint_every = 0;
  bool first_order = false, own = false, weighted = false, at_steps = false, per_task = false;
  char lr = '1';          // one step size, one per parameter ('p'), one per element ('e')
  bool lr_alone = false;  // no other gradient is wanted
  bool forward = false;   // nor is that
};

const How all[] = {
    {"second order"},
    {"weighted, a row for each task", Tail::loss, 2, 0, false, false, true, false, true, 'p'},
    {"own parameters, checkpoints", Tail::loss, 5, 2, false, true, false, false, false, 'e'},
    {"checkpoints at every step", Tail::loss, 3, 1},
    {"losses at every step", Tail::loss, 4, 3, false, false, true, true, false, 'p'},
    {"losses at every step, forward", Tail::loss, 3, 0, false, false, false, true, false, '1', false, true},
    {"first order", Tail::loss, 2, 0, true, false, false, false, false, 'p'},
    {"step sizes alone", Tail::loss, 2, 0, false, false, false, false, false, 'e', true},
    {"no steps", Tail::loss, 0},
    {"weights", Tail::weights, 2, 0, false, false, false, false, false, 'p'},
    {"weights, first order", Tail::weights, 2, 0, true, true, false, false, false, 'e'},
    {"output", Tail::output, 0},
    {"curvature", Tail::curvature, 0, 0, false, false, true, false, true},
};

struct Results {
  Vector out, loss, grads, grad_lr, grad_x_s, grad_x_q;
};

struct Data {
  int64_t T, N, Q, S = 1;
  std::vector<Vector> params;
  Vector lr, x_s, x_q, y_s, y_q, weight_s, weight_q, step_weights, seed, grad_loss;
  std::vector<int64_t> class_s, class_q;
};

Data draw(const Program& p, const How& how, int64_t T, int64_t N = 5, int64_t Q = 3) {
  Data d;
  d.T = T, d.N = N, d.Q = Q;
  const int64_t x = p.buffers[0].R * p.buffers[0].C, y = p.buffers[p.output].R * p.buffers[p.output].C;
  for (std::size_t i = 0; i < p.params.size(); ++i) {
    const bool own = how.own && i % 2 == 0;
    d.params.push_back(randoms((own ? d.T : 1) * p.params[i].O * p.params[i].I, -0.7, 0.8));
  }
  d.S = how.lr == '1' ? 1 : how.lr == 'p' ? int64_t(p.params.size()) : p.P;
  d.lr = randoms(how.K * d.S, 0.02, 0.2);
  d.x_s = randoms(d.T * d.N * x), d.x_q = randoms(d.T * d.Q * x);
  d.y_s = randoms(d.T * d.N * y), d.y_q = randoms(d.T * d.Q * y);
  for (int64_t i = 0; i < d.T * d.N; ++i) d.class_s.push_back(i * 7 % y);
  for (int64_t i = 0; i < d.T * d.Q; ++i) d.class_q.push_back(i * 5 % y);
  if (how.weighted) d.weight_s = randoms(d.T * d.N, 0.1, 2), d.weight_q = randoms(d.T * d.Q, 0.1, 2);
  for (int64_t k = 0; k < how.K && how.at_steps; ++k) d.step_weights.push_back(k == 1 ? 0 : 0.3 + 0.2 * k);
  d.seed = randoms(how.tail == Tail::output ? d.T * d.Q * y : d.T * p.P);
  for (int64_t i = 0; i < p.P * d.T && how.tail == Tail::weights; ++i) {  // of what lies between parameters
    bool inside = false;
    for (const Param& q : p.params) inside |= i % p.P >= q.offset && i % p.P < q.offset + q.O * q.I;
    if (!inside) d.seed[i] = 0;
  }
  d.grad_loss = randoms(d.T);
  return d;
}

template <class T>
const T* data(const std::vector<T>& v) {
  return v.empty() ? nullptr : v.data();
}
template <class T>
T* fresh(std::vector<T>& v, bool wanted, int64_t n, T value = std::numeric_limits<T>::quiet_NaN()) {
  if (wanted) v.assign(n, value);
  return wanted ? v.data() : nullptr;
}

// what is wanted of a call, for either engine
struct Wanted {
  bool out, loss, grads, lr, x_s, x_q;
  Wanted(const How& how) {
    const bool backward = !how.forward, more = backward && !how.lr_alone;
    out = how.tail == Tail::weights || how.tail == Tail::output;
    loss = how.tail == Tail::loss;
    grads = more, x_s = more && how.K > 0, x_q = more && how.tail != Tail::weights;
    lr = backward && how.K > 0;
  }
};

Results on_cpu(const Program& p, const How& how, const Data& d) {
  Results r;
  const Wanted w(how);
  Request q;
  q.program = &p, q.is_double = true, q.tail = how.tail, q.T = d.T, q.K = how.K, q.S = d.S;
  q.checkpoint_every = how.checkpoint_every, q.first_order = how.first_order, q.per_task = true;
  q.scale = how.tail == Tail::loss ? 0.7 : 1;
  q.step_weights = d.step_weights;
  for (std::size_t i = 0; i < p.params.size(); ++i)
    q.params.push_back(d.params[i].data()), q.own.push_back(how.own && i % 2 == 0);
  q.lr = data(d.lr), q.seed = w.grads || how.tail == Tail::curvature ? data(d.seed) : nullptr;
  q.grad_loss = data(d.grad_loss);
  const bool classes = p.loss == fastmaml::Loss::cross_entropy;
  const void *y_s = d.y_s.data(), *y_q = d.y_q.data();
  if (classes) y_s = d.class_s.data(), y_q = d.class_q.data();
  if (how.K > 0) q.support = {d.x_s.data(), y_s, data(d.weight_s), d.N};
  if (how.tail != Tail::weights) q.query = {d.x_q.data(), y_q, data(d.weight_q), d.Q};
  const int64_t y = p.buffers[p.output].R * p.buffers[p.output].C;
  q.out = fresh(r.out, w.out, how.tail == Tail::weights ? d.T * p.P : d.T * d.Q * y);
  q.loss = fresh(r.loss, true, d.T);
  q.grads = fresh(r.grads, w.grads, d.T * p.P);
  q.grad_lr = fresh(r.grad_lr, w.lr, d.T * how.K * d.S);
  q.grad_x_s = fresh(r.grad_x_s, w.x_s, d.x_s.size());
  q.grad_x_q = fresh(r.grad_x_q, w.x_q, d.x_q.size());
  run_generic(q);
  return r;
}

// Inputs and outputs of the kernels, which are all allocated at their exact size, so that ASan sees what goes
// beyond; the outputs are NaN before.
template <class T>
struct Numbers {
  std::vector<std::vector<T>> params;
  std::vector<T> lr, x_s, x_q, y_s, y_q, weight_s, weight_q, step_weights, seed, grad_loss;
  std::vector<T> out, loss, grads, grad_lr, grad_x_s, grad_x_q;

  static std::vector<T> of(const Vector& v) { return {v.begin(), v.end()}; }
  explicit Numbers(const Data& d)
      : lr(of(d.lr)),
        x_s(of(d.x_s)),
        x_q(of(d.x_q)),
        y_s(of(d.y_s)),
        y_q(of(d.y_q)),
        weight_s(of(d.weight_s)),
        weight_q(of(d.weight_q)),
        step_weights(of(d.step_weights)),
        seed(of(d.seed)),
        grad_loss(of(d.grad_loss)) {
    for (const Vector& p : d.params) params.push_back(of(p));
  }
  Results results() const {
    auto wide = [](const std::vector<T>& v) { return Vector(v.begin(), v.end()); };
    return {wide(out), wide(loss), wide(grads), wide(grad_lr), wide(grad_x_s), wide(grad_x_q)};
  }
};

template <class T>
Results on_cuda(const Program& p, const How& how, const Data& d, cuda::Precision precision, int64_t threads) {
  Numbers<T> v(d);
  const Wanted w(how);
  cuda::Sizes sizes{sizeof(T),
                    how.K > 0 ? d.N : 0,
                    how.tail == Tail::weights ? 0 : d.Q,
                    w.grads || w.lr || w.x_s,
                    (w.grads || w.lr || w.x_s) && how.K > 0 && !how.first_order,
                    how.tail == Tail::curvature,
                    w.x_s,
                    w.x_q,
                    w.lr,
                    threads,
                    FASTMAML_CLUSTER ? 0 : INT32_MAX,  // 0: as many blocks as there may be
                    FASTMAML_CLUSTER ? 4 : 1};
  cuda::Table table;
  cuda::Planner(p, sizes, table).plan();
  cuda::Call c{};
  c.T = d.T, c.K = how.K, c.S = d.S, c.tail = int64_t(how.tail), c.first_order = how.first_order;
  c.precision = precision;
  c.every = how.checkpoint_every > 0 ? how.checkpoint_every : std::max<int64_t>(how.K, 1);
  c.scale = how.tail == Tail::loss ? 0.7 : 1;
  for (std::size_t i = 0; i < p.params.size(); ++i)
    c.params[i] = v.params[i].data(), c.own[i] = how.own && i % 2 == 0;
  c.lr = data(v.lr), c.step_weights = data(v.step_weights), c.grad_loss = data(v.grad_loss);
  c.seed = w.grads || how.tail == Tail::curvature ? data(v.seed) : nullptr;
  const bool classes = p.loss == fastmaml::Loss::cross_entropy;
  const void *y_s = v.y_s.data(), *y_q = v.y_q.data();
  if (classes) y_s = d.class_s.data(), y_q = d.class_q.data();
  if (how.K > 0) c.support = {v.x_s.data(), y_s, data(v.weight_s), d.N};
  if (how.tail != Tail::weights) c.query = {v.x_q.data(), y_q, data(v.weight_q), d.Q};
  if (sizes.adjoint && how.K > 0) c.stored_sets = (how.K - 1) / c.every + c.every - 1;
  std::vector<T> stored, total;
  c.stored = fresh(stored, true, d.T * c.stored_sets * table.P);
  const int64_t y = p.buffers[p.output].R * p.buffers[p.output].C;
  c.out = fresh(v.out, w.out, how.tail == Tail::weights ? d.T * p.P : d.T * d.Q * y);
  c.loss = fresh(v.loss, w.loss, d.T);
  c.grads = fresh(v.grads, w.grads, d.T * p.P);
  c.grad_lr = fresh(v.grad_lr, w.lr, d.T * how.K * d.S, T(0));
  c.grad_x_s = fresh(v.grad_x_s, w.x_s, d.x_s.size(), T(0));
  c.grad_x_q = fresh(v.grad_x_q, w.x_q, d.x_q.size(), T(0));
  cuda::Sums sums{};
  sums.T = d.T;
  if (w.grads && d.T > 1) sums.of[sums.count++] = {c.grads, fresh(total, true, p.P), p.P};
  if (cuda::FASTMAML_TEAM::run<T>(table, c, sums, nullptr)) fail("error", 1, 0);
  for (int64_t i = 0; i < p.P && sums.count; ++i) {
    T sum = 0;
    for (int64_t t = 0; t < d.T; ++t) sum += v.grads[t * p.P + i];
    if (!(total[i] == sum)) fail("sum over tasks", total[i], sum);
  }
  return v.results();
}

// Every result, in every order of the threads: within the bound of the engine's, and the same bits each time.
template <class T>
void check_call(const std::string& name, const Program& p, const How& how, const Data& d,
                cuda::Precision precision, int64_t threads, const std::vector<const char*>& orders,
                double bound) {
  const Results wanted = on_cpu(p, how, d);
  Results first;
  for (const char* order : orders) {
    now = name + ", " + how.name + ", " + order;
    setenv("FASTMAML_EMULATE_ORDER", order, 1);
    const Results r = on_cuda<T>(p, how, d, precision, threads);
    check("out", r.out, wanted.out, bound);
    check("loss", r.loss, wanted.loss, bound);
    check("grads", r.grads, wanted.grads, bound);
    check("grad_lr", r.grad_lr, wanted.grad_lr, bound);
    check("grad_x_s", r.grad_x_s, wanted.grad_x_s, bound);
    check("grad_x_q", r.grad_x_q, wanted.grad_x_q, bound);
    if (order == orders[0]) first = r;
    if (r.grads != first.grads || r.grad_lr != first.grad_lr || r.loss != first.loss)
      fail("another order of the threads changes the result", 1, 0);
  }
}

}  // namespace
