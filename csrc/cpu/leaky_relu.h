// y = x above zero, slope x below; relu is slope 0. The slope at 0 is that of the negative side, as in torch.
#pragma once
#include "elementwise.h"

namespace fastmaml::FASTMAML_ISA {

template <class T>
struct LeakyRelu {
  static constexpr bool at_zero = false;
  T slope;
  FASTMAML_INLINE Vec<T> value(Vec<T> x) const { return leaky_relu<T>(x, slope); }
  FASTMAML_INLINE void slopes(Vec<T> x, Vec<T>, Vec<T>& first, Vec<T>& second) const {
    first = x > T(0) ? splat(T(1)) : splat(slope);
    second = Vec<T>{};
  }
};

}  // namespace fastmaml::FASTMAML_ISA
