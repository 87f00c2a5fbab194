// y = tanh x;  y' = 1 - y^2;  y'' = -2 y y'
#pragma once
#include "block.cuh"

namespace fastmaml::cuda {

struct Tanh {
  template <class T>
  FASTMAML_DEVICE T value(T x) const {
    return tanh(x);
  }
  template <class T>
  FASTMAML_DEVICE void slopes(T, T y, T& first, T& second) const {
    first = 1 - y * y;
    second = -2 * y * first;
  }
};

}  // namespace fastmaml::cuda
