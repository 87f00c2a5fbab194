// y = 1 / (1 + e^-x);  y' = y (1 - y);  y'' / y' = 1 - 2 y
#pragma once
#include "team.cuh"

namespace fastmaml::cuda::FASTMAML_TEAM {

template <class T>
FASTMAML_DEVICE T sigmoid_of(T x) {
  return 1 / (1 + exp(-x));
}

struct Sigmoid {
  static constexpr bool of_output = true;
  template <class T>
  FASTMAML_DEVICE T value(T x) const {
    return sigmoid_of(x);
  }
  template <class T>
  FASTMAML_DEVICE void slopes(T y, T& first, T& second) const {
    first = y * (1 - y);
    second = 1 - 2 * y;
  }
};

}  // namespace fastmaml::cuda::FASTMAML_TEAM
