// The threads that share a task, a team: how they divide work, add up and wait for each other, and the memory
// that they share. A team is a block or, in namespace cluster, a cluster of blocks, whose shared memories
// make up one.
#pragma once
#include "table.h"

namespace fastmaml::cuda::FASTMAML_TEAM {

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

#if FASTMAML_CLUSTER
// Number `at` of the cluster's memory. Blocks have whole vectors of 16 bytes each, so that a vector lies in
// one of them: the one of the place over a block's vectors, which 2^32 over these, rounded up, tells exactly
// for 8 blocks.
template <class T>
struct Place {
  int at;

  FASTMAML_DEVICE T* pointer() const {
    const unsigned vectors = shared_bytes() / 16, vector = unsigned(at) / lanes<T>;
    const unsigned block = __umulhi(vector, 0xffffffffu / vectors + 1);
    return shared_of(block, own_shared<T>() + (at - int(block * vectors) * lanes<T>));
  }
  FASTMAML_DEVICE Place operator+(int i) const { return {at + i}; }
  FASTMAML_DEVICE T& operator[](int i) const { return *(*this + i).pointer(); }
  FASTMAML_DEVICE T& operator*() const { return *pointer(); }
};
template <class T>
FASTMAML_DEVICE Place<T> shared() {
  return {0};
}
template <class T>
FASTMAML_DEVICE Vec<T> load(Place<T> p) {
  return load(p.pointer());
}
template <int n, class T>
FASTMAML_DEVICE Vec<T, n> load(Place<T> p) {
  return load<n>(p.pointer());
}
template <class T, int n>
FASTMAML_DEVICE void store(Place<T> p, const Vec<T, n>& v) {
  store(p.pointer(), v);
}

FASTMAML_DEVICE int thread() { return int(cluster_rank() * blockDim.x + threadIdx.x); }
FASTMAML_DEVICE int threads() { return int(cluster_blocks() * blockDim.x); }
FASTMAML_DEVICE int team() { return int(blockIdx.x / cluster_blocks()); }
FASTMAML_DEVICE int teams() { return int(gridDim.x / cluster_blocks()); }
#else
template <class T>
using Place = T*;
template <class T>
FASTMAML_DEVICE Place<T> shared() {
  return own_shared<T>();
}

FASTMAML_DEVICE int thread() { return int(threadIdx.x); }
FASTMAML_DEVICE int threads() { return int(blockDim.x); }
FASTMAML_DEVICE int team() { return int(blockIdx.x); }
FASTMAML_DEVICE int teams() { return int(gridDim.x); }
#endif

FASTMAML_DEVICE int divide_up(int n, int m) { return (n + m - 1) / m; }
FASTMAML_DEVICE int least(int a, int b) { return a < b ? a : b; }
template <class T>
FASTMAML_DEVICE int whole_vectors(int n) {
  return divide_up(n, lanes<T>) * lanes<T>;
}

FASTMAML_DEVICE int lane() { return int(threadIdx.x) % 32; }
FASTMAML_DEVICE int warp() { return thread() / 32; }
FASTMAML_DEVICE int warps() { return threads() / 32; }

// f(i) for i below n, one to a thread at a time
template <class F>
FASTMAML_DEVICE void each(int n, const F& f) {
  for (int i = thread(); i < n; i += threads()) f(i);
}
// f(row, column)
template <class F>
FASTMAML_DEVICE void each(int rows, int columns, const F& f) {
  for (int i = thread(); i < rows * columns; i += threads()) f(i / columns, i % columns);
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

}  // namespace fastmaml::cuda::FASTMAML_TEAM
