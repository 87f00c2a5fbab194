// y = tanh x;  y' = 1 - y^2;  y'' / y' = -2 y
#pragma once
#include "team.cuh"

namespace fastmaml::cuda::FASTMAML_TEAM {

struct Tanh {
  static constexpr bool of_output = true;
  template <class T>
  FASTMAML_DEVICE T value(T x) const {
    return tanh(x);
  }
  template <class T>
  FASTMAML_DEVICE void slopes(T y, T& first, T& second) const {
    first = 1 - y * y;
    second = -2 * y;
  }
};

}  // namespace fastmaml::cuda::FASTMAML_TEAM
