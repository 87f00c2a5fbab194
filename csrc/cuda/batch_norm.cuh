// Batch norm: each column over the rows of the current set; formulas in norm.cuh.
#pragma once
#include "norm.cuh"

namespace fastmaml::cuda::FASTMAML_TEAM {

template <bool Dual, class T>
FASTMAML_DEVICE void batch_norm_forward(int number, const OpRow& op, const Pass<T>& p) {
  norm_forward<false, Dual>(number, op, p);
}

template <bool Dual, class T>
FASTMAML_DEVICE void batch_norm_backward(int number, const OpRow& op, const Pass<T>& p) {
  norm_backward<false, Dual>(number, op, p);
}

}  // namespace fastmaml::cuda::FASTMAML_TEAM
