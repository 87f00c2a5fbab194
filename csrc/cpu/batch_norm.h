// Batch norm: each column over the rows of the current set; formulas in norm.h.
#pragma once
#include "norm.h"

namespace fastmaml::FASTMAML_ISA {

template <bool Dual, class T>
void batch_norm_forward(const OpPlan& o, const Pass<T>& p) {
  norm_forward<false, Dual>(o, p);
}

template <bool Dual, class T>
void batch_norm_backward(const OpPlan& o, const Pass<T>& p) {
  norm_backward<false, Dual>(o, p);
}

}  // namespace fastmaml::FASTMAML_ISA
