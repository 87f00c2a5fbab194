// Hendrycks & Gimpel 2016, arXiv 1606.08415.
//   exact  y = x F(x), F the normal distribution, f its density;  y' = F + x f;  y'' = f (2 - x^2)
//   tanh   y = x (1 + t) / 2, t = tanh u, u = sqrt(2 / pi) (x + 0.044715 x^3)
#pragma once
#include "team.cuh"

namespace fastmaml::cuda::FASTMAML_TEAM {

struct Gelu {
  static constexpr bool of_output = false;
  template <class T>
  FASTMAML_DEVICE static T normal(T x) {
    return T(0.5) * (1 + erf(x * T(0.70710678118654752440)));
  }
  template <class T>
  FASTMAML_DEVICE T value(T x) const {
    return x * normal(x);
  }
  template <class T>
  FASTMAML_DEVICE void slopes(T x, T& first, T& second) const {
    const T density = T(0.39894228040143267794) * exp(T(-0.5) * x * x);
    first = normal(x) + x * density;
    second = density * (2 - x * x);
  }
};

struct GeluTanh {
  static constexpr bool of_output = false;
  template <class T>
  FASTMAML_DEVICE static T inner(T x) {
    return T(0.79788456080286535588) * x * (1 + T(0.044715) * x * x);
  }
  template <class T>
  FASTMAML_DEVICE T value(T x) const {
    return T(0.5) * x * (1 + tanh(inner(x)));
  }
  template <class T>
  FASTMAML_DEVICE void slopes(T x, T& first, T& second) const {
    const T c = T(0.79788456080286535588), k = T(0.044715);
    const T t = tanh(inner(x)), u1 = c * (1 + 3 * k * x * x), u2 = 6 * c * k * x;
    const T t1 = (1 - t * t) * u1, t2 = (1 - t * t) * u2 - 2 * t * t1 * u1;
    first = T(0.5) * (1 + t + x * t1);
    second = t1 + T(0.5) * x * t2;
  }
};

}  // namespace fastmaml::cuda::FASTMAML_TEAM
