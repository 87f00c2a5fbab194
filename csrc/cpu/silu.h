// y = x s, s = sigmoid x;  y' = s (1 + x (1 - s));  y'' = s (1 - s) (2 + x (1 - 2 s))
#pragma once
#include "elementwise.h"

namespace fastmaml::FASTMAML_ISA {

template <class T>
struct Silu {
  static constexpr bool at_zero = false;
  FASTMAML_INLINE Vec<T> value(Vec<T> x) const { return x * sigmoid<T>(x); }
  FASTMAML_INLINE void slopes(Vec<T> x, Vec<T>, Vec<T>& first, Vec<T>& second) const {
    const Vec<T> s = sigmoid<T>(x), s1 = s * (T(1) - s);
    first = s + x * s1;
    second = s1 * (T(2) + x * (T(1) - T(2) * s));
  }
};

}  // namespace fastmaml::FASTMAML_ISA
