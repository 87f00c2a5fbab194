// The engine without torch, for the sanitizers: the meta-gradient against finite differences, on odd sizes and several threads.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>

#include "cpu/request.h"

using namespace fastmaml;

namespace {

constexpr int64_t T = 9, N = 3, Q = 5, K = 3;

std::vector<double> randoms(std::size_t n, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<double> normal;
  std::vector<double> v(n);
  for (double& a : v) a = 0.5 * normal(generator);
  return v;
}

// 3 -> 9 -> 9 -> 2: linear, batch norm, tanh, linear (tied weights would share a slot), layer norm, silu, add, linear
Program program(Loss loss) {
  Program p;
  p.buffers = {{1, 3}, {1, 9}, {1, 9}, {1, 9}, {1, 9}, {1, 9}, {1, 9}, {1, 9}, {1, 2}};
  int64_t at = 0;
  auto param = [&](int64_t O, int64_t I, bool matrix) {
    p.params.push_back({O, I, matrix, true, at});
    at += round_up(O * I, 8);
    return static_cast<int64_t>(p.params.size()) - 1;
  };
  const int64_t w0 = param(9, 3, true), b0 = param(9, 1, false), g0 = param(9, 1, false), s0 = param(9, 1, false);
  const int64_t w1 = param(9, 9, true), g1 = param(9, 1, false), s1 = param(9, 1, false), w2 = param(2, 9, true), b2 = param(2, 1, false);
  p.ops = {{Kind::linear, 0, -1, 1, w0, b0, false, false, 0, 0, 0},
           {Kind::batch_norm, 1, -1, 2, g0, s0, false, false, 1e-2, 0, 0},
           {Kind::tanh, 2, -1, 3, -1, -1, false, false, 0, 0, 0},
           {Kind::linear, 3, -1, 4, w1, -1, false, false, 0, 0, 0},
           {Kind::layer_norm, 4, -1, 5, g1, s1, false, false, 1e-2, 0, 0},
           {Kind::silu, 5, -1, 6, -1, -1, false, false, 0, 0, 0},
           {Kind::add, 6, 3, 7, -1, -1, false, false, 0, 0, 0},
           {Kind::linear, 7, -1, 8, w2, b2, false, false, 0, 0, 0}};
  p.output = 8;
  p.P = at;
  p.loss = loss;
  return p;
}

int failures = 0;

void check(Loss loss, int threads, int64_t checkpoint_every, bool per_element) {
  Request q;
  q.program = program(loss);
  q.is_double = true;
  q.T = T, q.K = K, q.threads = threads, q.checkpoint_every = checkpoint_every;
  std::vector<double> theta = randoms(q.program.P, 1);
  const std::vector<double> x_s = randoms(T * N * 3, 2), x_q = randoms(T * Q * 3, 3), y_s = randoms(T * N * 2, 4), y_q = randoms(T * Q * 2, 5);
  const std::vector<int64_t> c_s(T * N, 1), c_q(T * Q, 0);
  q.S = per_element ? q.program.P : 1;
  std::vector<double> lr(K * q.S, 0.1);
  for (const Param& p : q.program.params) q.params.push_back(theta.data() + p.offset), q.own.push_back(0);
  const bool classes = loss == Loss::cross_entropy;
  q.support = {x_s.data(), classes ? static_cast<const void*>(c_s.data()) : y_s.data(), nullptr, N};
  q.query = {x_q.data(), classes ? static_cast<const void*>(c_q.data()) : y_q.data(), nullptr, Q};
  q.lr = lr.data();

  std::vector<double> losses(T), grads(q.program.P), grad_lr(K * q.S), grad_x(x_s.size());
  q.loss = losses.data(), q.grads = grads.data(), q.grad_lr = grad_lr.data(), q.grad_x_s = grad_x.data();
  run(q);
  q.grads = q.grad_lr = q.grad_x_s = nullptr;
  auto total = [&] {
    run(q);
    double sum = 0;
    for (double l : losses) sum += l;
    return sum;
  };
  auto compare = [&](const char* what, double* at, double derivative) {
    const double h = 1e-6, old = *at;
    *at = old + h;
    const double up = total();
    *at = old - h;
    const double down = total();
    *at = old;
    const double expected = (up - down) / (2 * h);
    if (std::abs(derivative - expected) > 1e-6 * (1 + std::abs(expected))) {
      std::printf("%s: %.12g, finite differences %.12g\n", what, derivative, expected);
      ++failures;
    }
  };
  for (const Param& p : q.program.params)
    for (int64_t i = 0; i < p.O * p.I; i += 4) compare("params", &theta[p.offset + i], grads[p.offset + i]);
  for (int64_t i = 0; i < std::min<int64_t>(lr.size(), 60); i += 3) compare("lr", &lr[i], grad_lr[i]);
  for (std::size_t i = 0; i < x_s.size(); i += 5) compare("x", const_cast<double*>(&x_s[i]), grad_x[i]);
}

}  // namespace

int main() {
  int checks = 0;
  for (Loss loss : {Loss::mse, Loss::cross_entropy})
    for (int threads : {1, 3})
      for (int64_t every : {0, 2}) {
        check(loss, threads, every, threads == 3);
        ++checks;
      }
  std::printf("%s: %d checks, %d failures\n", isa().c_str(), checks, failures);
  return failures ? EXIT_FAILURE : EXIT_SUCCESS;
}
