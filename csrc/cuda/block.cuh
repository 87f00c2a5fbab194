// How the threads of a block share work: loops over elements, sums over a warp, vectors of 16 bytes.
#pragma once
#include "table.h"

namespace fastmaml::cuda {

template <class T>
constexpr int lanes = 16 / sizeof(T);

template <class T, int n = lanes<T>>
struct alignas(n * sizeof(T)) Vec {
  T at[n];
};
template <class T>
FASTMAML_DEVICE Vec<T> load(const T* p) {
  return *reinterpret_cast<const Vec<T>*>(p);
}
template <int n, class T>
FASTMAML_DEVICE Vec<T, n> load(const T* p) {
  return *reinterpret_cast<const Vec<T, n>*>(p);
}
template <class T, int n>
FASTMAML_DEVICE void store(T* p, const Vec<T, n>& v) {
  *reinterpret_cast<Vec<T, n>*>(p) = v;
}
template <class T>
FASTMAML_DEVICE Vec<T> zeros() {
  return Vec<T>{};
}

FASTMAML_DEVICE int divide_up(int n, int m) { return (n + m - 1) / m; }
FASTMAML_DEVICE int least(int a, int b) { return a < b ? a : b; }
template <class T>
FASTMAML_DEVICE int whole_vectors(int n) {
  return divide_up(n, lanes<T>) * lanes<T>;
}

FASTMAML_DEVICE int lane() { return int(threadIdx.x) % 32; }
FASTMAML_DEVICE int warp() { return int(threadIdx.x) / 32; }
FASTMAML_DEVICE int warps() { return int(blockDim.x) / 32; }

// f(i) for i below n, one to a thread at a time
template <class F>
FASTMAML_DEVICE void each(int n, const F& f) {
  for (int i = threadIdx.x; i < n; i += blockDim.x) f(i);
}
// f(row, column)
template <class F>
FASTMAML_DEVICE void each(int rows, int columns, const F& f) {
  for (int i = threadIdx.x; i < rows * columns; i += blockDim.x) f(i / columns, i % columns);
}

// The sum over a warp, in every lane, in an order that does not change.
template <class T>
FASTMAML_DEVICE T warp_sum(T v) {
  for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
  return v;
}
template <class T>
FASTMAML_DEVICE T warp_max(T v) {
  for (int offset = 16; offset > 0; offset /= 2) {
    const T other = __shfl_xor_sync(0xffffffffu, v, offset);
    v = other > v ? other : v;
  }
  return v;
}

}  // namespace fastmaml::cuda
