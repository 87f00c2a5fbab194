// y = x s, s = sigmoid x;  y' = s (1 + x (1 - s));  y'' = s (1 - s) (2 + x (1 - 2 s))
#pragma once
#include "sigmoid.cuh"

namespace fastmaml::cuda::FASTMAML_TEAM {

struct Silu {
  static constexpr bool of_output = false;
  template <class T>
  FASTMAML_DEVICE T value(T x) const {
    return x * sigmoid_of(x);
  }
  template <class T>
  FASTMAML_DEVICE void slopes(T x, T& first, T& second) const {
    const T s = sigmoid_of(x), s1 = s * (1 - s);
    first = s + x * s1;
    second = s1 * (2 + x * (1 - 2 * s));
  }
};

}  // namespace fastmaml::cuda::FASTMAML_TEAM
