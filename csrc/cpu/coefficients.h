// The coefficients of a factored weight's outer products, which is all that a step of SGD (descent.h)
// changes:
//   W_k = omega_k theta - sum_{j<k} alpha_kj c_j d_j^T x_j          c_j: of clipping
//   M_k = rho_k theta + sum_{j<k} beta_kj c_j d_j^T x_j
//   v_k = -sum_{b>=k} gamma_kb R_b,  n_{k+1} = -sum_{b>k} delta_kb R_b
// where R_b is what v_b has got anew: the outer products of the query set after b steps, and of the dual
// sweep of step b. They are the same for every task. Plain descent has alpha_kj = a_j, delta_kb = -a_k, gamma
// = omega = 1.
#pragma once
#include <cstdint>
#include <vector>

namespace fastmaml::FASTMAML_ISA {

template <class T>
struct Coefficients {
  int64_t K = 0;
  double momentum = 0, weight_decay = 0;
  std::vector<T> rates;                      // [K]: the step sizes a_k, 0 if the weight is frozen
  std::vector<T> omega, rho;                 // [K + 1]
  std::vector<T> alpha, beta, gamma, delta;  // [K + 1, K + 1]

  T of(const std::vector<T>& table, int64_t k, int64_t j) const { return table[k * (K + 1) + j]; }
  bool decays() const { return weight_decay != 0; }

  Coefficients() = default;
  Coefficients(std::vector<T> a, double momentum, double weight_decay)
      : K(a.size()), momentum(momentum), weight_decay(weight_decay), rates(std::move(a)) {
    const int64_t row = K + 1;
    for (auto* table : {&alpha, &beta, &gamma, &delta}) table->assign(row * row, T(0));
    omega.assign(row, T(1)), rho.assign(row, T(0));
    double o = 1, r = 0;
    for (int64_t k = 0; k < K; ++k) {
      r = momentum * r + weight_decay * o, o -= rates[k] * r;
      rho[k + 1] = T(r), omega[k + 1] = T(o);
    }
    for (int64_t j = 0; j < K; ++j) {
      double first = 0, second = 0;
      for (int64_t k = j; k < K; ++k) {
        second = k == j ? 1 : momentum * second - weight_decay * first;
        first += rates[k] * second;
        beta[(k + 1) * row + j] = T(second), alpha[(k + 1) * row + j] = T(first);
      }
    }
    for (int64_t b = K; b >= 0; --b) {
      double first = 1, second = 0;
      gamma[b * row + b] = T(1);
      for (int64_t k = b - 1; k >= 0; --k) {
        second = momentum * second - rates[k] * first;
        first += weight_decay * second;
        delta[k * row + b] = T(second), gamma[k * row + b] = T(first);
      }
    }
  }
};

}  // namespace fastmaml::FASTMAML_ISA
