// y = x above zero, slope x below; relu is slope 0. The slope at 0 is that of the negative side, as in torch.
#pragma once
#include "team.cuh"

namespace fastmaml::cuda::FASTMAML_TEAM {

template <class T>
FASTMAML_DEVICE T leaky_relu_of(T x, T slope) {
  return x < 0 ? slope * x : x;
}
// d times the slope at an output or input x
template <class T>
FASTMAML_DEVICE T leaky_relu_grad(T d, T x, T slope) {
  return x > 0 ? d : slope * d;
}

template <class T>
struct LeakyRelu {
  static constexpr bool of_output = false;
  T slope;
  FASTMAML_DEVICE T value(T x) const { return leaky_relu_of(x, slope); }
  FASTMAML_DEVICE void slopes(T x, T& first, T& second) const {
    first = x > 0 ? T(1) : slope;
    second = 0;
  }
};

}  // namespace fastmaml::cuda::FASTMAML_TEAM
