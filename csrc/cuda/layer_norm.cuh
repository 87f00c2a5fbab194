// Layer norm: each row over its columns; formulas in norm.cuh.
#pragma once
#include "norm.cuh"

namespace fastmaml::cuda::FASTMAML_TEAM {

template <bool Dual, class T>
FASTMAML_DEVICE void layer_norm_forward(int number, const OpRow& op, const Pass<T>& p) {
  norm_forward<true, Dual>(number, op, p);
}

template <bool Dual, class T>
FASTMAML_DEVICE void layer_norm_backward(int number, const OpRow& op, const Pass<T>& p) {
  norm_backward<true, Dual>(number, op, p);
}

}  // namespace fastmaml::cuda::FASTMAML_TEAM
