// Layer norm: each row over its columns; formulas in norm.h.
#pragma once
#include "norm.h"

namespace fastmaml::FASTMAML_ISA {

template <bool Dual, class T>
void layer_norm_forward(const OpPlan& o, const Pass<T>& p) {
  norm_forward<true, Dual>(o, p);
}

template <bool Dual, class T>
void layer_norm_backward(const OpPlan& o, const Pass<T>& p) {
  norm_backward<true, Dual>(o, p);
}

}  // namespace fastmaml::FASTMAML_ISA
