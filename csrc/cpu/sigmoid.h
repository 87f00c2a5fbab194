// y = 1 / (1 + e^-x);  y' = y (1 - y);  y'' = y' (1 - 2 y)
#pragma once
#include "elementwise.h"

namespace fastmaml::FASTMAML_ISA {

template <class T>
struct Sigmoid {
  static constexpr bool at_zero = true;
  FASTMAML_INLINE Vec<T> value(Vec<T> x) const { return sigmoid<T>(x); }
  FASTMAML_INLINE void slopes(Vec<T>, Vec<T> y, Vec<T>& first, Vec<T>& second) const {
    first = y * (T(1) - y);
    second = first * (T(1) - T(2) * y);
  }
};

}  // namespace fastmaml::FASTMAML_ISA
