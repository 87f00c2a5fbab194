// y = tanh x;  y' = 1 - y^2;  y'' = -2 y y'
#pragma once
#include "elementwise.h"

namespace fastmaml::FASTMAML_ISA {

template <class T>
struct Tanh {
  static constexpr bool at_zero = false;
  FASTMAML_INLINE Vec<T> value(Vec<T> x) const { return tanh<T>(x); }
  FASTMAML_INLINE void slopes(Vec<T>, Vec<T> y, Vec<T>& first, Vec<T>& second) const {
    first = T(1) - y * y;
    second = T(-2) * y * first;
  }
};

}  // namespace fastmaml::FASTMAML_ISA
