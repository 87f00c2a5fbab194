// Hendrycks & Gimpel 2016, arXiv 1606.08415.
//   exact  y = x F(x), F the normal distribution, f its density;  y' = F + x f;  y'' = f (2 - x^2)
//   tanh   y = x (1 + t) / 2, t = tanh u, u = sqrt(2 / pi) (x + 0.044715 x^3)
#pragma once
#include "elementwise.h"

namespace fastmaml::FASTMAML_ISA {

template <class T>
struct Gelu {
  static constexpr bool at_zero = false;
  FASTMAML_INLINE static Vec<T> normal(Vec<T> x) {
    return T(0.5) * (T(1) + erf<T>(x * T(0.70710678118654752440)));
  }
  FASTMAML_INLINE Vec<T> value(Vec<T> x) const { return x * normal(x); }
  FASTMAML_INLINE void slopes(Vec<T> x, Vec<T>, Vec<T>& first, Vec<T>& second) const {
    const Vec<T> density = T(0.39894228040143267794) * exp<T>(T(-0.5) * x * x);
    first = normal(x) + x * density;
    second = density * (T(2) - x * x);
  }
};

template <class T>
struct GeluTanh {
  static constexpr bool at_zero = false;
  static constexpr T c = T(0.79788456080286535588), k = T(0.044715);
  FASTMAML_INLINE Vec<T> value(Vec<T> x) const {
    return T(0.5) * x * (T(1) + tanh<T>(c * x * (T(1) + k * x * x)));
  }
  FASTMAML_INLINE void slopes(Vec<T> x, Vec<T>, Vec<T>& first, Vec<T>& second) const {
    const Vec<T> t = tanh<T>(c * x * (T(1) + k * x * x)), u1 = c * (T(1) + T(3) * k * x * x),
                 u2 = T(6) * c * k * x;
    const Vec<T> t1 = (T(1) - t * t) * u1, t2 = (T(1) - t * t) * u2 - T(2) * t * t1 * u1;
    first = T(0.5) * (T(1) + t + x * t1);
    second = t1 + T(0.5) * x * t2;
  }
};

}  // namespace fastmaml::FASTMAML_ISA
