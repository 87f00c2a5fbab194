// Small dense products, the work of every linear layer: one output tile in registers, panels that stay in L1.
//   nn   C[m, c] = sum_k A[m, k] B[k, c]      A by broadcast at any strides, B and C by rows
//   nt   C[m, i] = sum_k A[m, k] B[i, k]      both by rows, k padded with zeros to whole vectors
// Either may be the sum of two products (the tangent of a product is one), and ends in one epilogue.
#pragma once
#include "simd.h"

namespace fastmaml::FASTMAML_ISA {

template <class T>
struct Factors {
  const T* a;
  int64_t a_row, a_col;  // strides of A
  const T* b;
  int64_t ldb;
};

// C = base + scale * C, then (leaky) relu, then the relu mask
template <class T>
struct Epilogue {
  const T* bias = nullptr;  // [columns of C]
  const T* base = nullptr;  // [rows, columns], may be C itself
  int64_t ld_base = 0;
  T scale = 1;
  const T* scale_each = nullptr;  // [rows, columns] as base
  bool act = false;
  T slope = 0;
  const T* mask = nullptr;  // [rows, columns]: multiply by the slope of the relu whose output this is
  int64_t ld_mask = 0;
  T mask_slope = 0;
};

template <class T, class V, class Load>
FASTMAML_INLINE V finish(V acc, int64_t m, int64_t c, const Epilogue<T>& e, Load read) {
  if (e.base) {
    const V base = read(e.base + m * e.ld_base + c);
    acc = e.scale_each ? base + read(e.scale_each + m * e.ld_base + c) * acc : base + e.scale * acc;
  } else if (e.scale_each) {
    acc = read(e.scale_each + m * e.ld_base + c) * acc;
  } else if (e.scale != T(1)) {
    acc = e.scale * acc;
  }
  if (e.act) acc = acc < T(0) ? acc * e.slope : acc;
  if (e.mask) acc = read(e.mask + m * e.ld_mask + c) > T(0) ? acc : acc * e.mask_slope;
  return acc;
}

template <class T, int MR, int NV, int NP>
FASTMAML_INLINE void nn_tile(int64_t K, const Factors<T>* f, int64_t m, int64_t c, T* C, int64_t ldc, const Epilogue<T>& e) {
  using V = Vec<T>;
  constexpr int W = lanes<T>;
  V acc[MR][NV];
  FASTMAML_UNROLL(j, NV) {
    const V start = e.bias ? load(e.bias + c + W * j) : V{};
    FASTMAML_UNROLL(i, MR) { acc[i][j] = start; });
  });
  FASTMAML_UNROLL(p, NP) {
    const int64_t a_row = f[p].a_row, a_col = f[p].a_col, ldb = f[p].ldb;
    const T* a = f[p].a + m * a_row;
    const T* b = f[p].b + c;
    for (int64_t k = 0; k < K; ++k, a += a_col, b += ldb) {
      V bv[NV];
      FASTMAML_UNROLL(j, NV) { bv[j] = load(b + W * j); });
      FASTMAML_UNROLL(i, MR) {
        const V av = splat(a[i * a_row]);
        FASTMAML_UNROLL(j, NV) { acc[i][j] += av * bv[j]; });
      });
    }
  });
  auto read = [](const T* p) __attribute__((always_inline)) { return load(p); };
  FASTMAML_UNROLL(i, MR) {
    FASTMAML_UNROLL(j, NV) { store(C + (m + i) * ldc + c + W * j, finish<T, V>(acc[i][j], m + i, c + W * j, e, read)); });
  });
}

// M rows in blocks of at most MR, as even as they go (10 = 5 + 5)
template <int MR, class Tile>
FASTMAML_INLINE void row_blocks(int64_t M, Tile tile) {
  const int64_t blocks = (M + MR - 1) / MR;
  for (int64_t b = 0, m = 0; b < blocks; ++b) {
    const int64_t rows = M / blocks + (b < M % blocks);
    FASTMAML_UNROLL(i, MR) {
      if (rows == i + 1) tile(std::integral_constant<int, i + 1>(), m);
    });
    m += rows;
  }
}

template <class T, int MR, int NV, int NP>
__attribute__((noinline)) void nn_panel(int64_t M, int64_t K, const Factors<T>* f, int64_t c, T* C, int64_t ldc, const Epilogue<T>& e) {
  row_blocks<MR>(M, [&](auto rows, int64_t m) __attribute__((always_inline)) { nn_tile<T, rows, NV, NP>(K, f, m, c, C, ldc, e); });
}

// columns: padded to whole vectors, all of them written
template <class T, int NP>
void nn(int64_t M, int64_t K, int64_t columns, const Factors<T>* f, T* C, int64_t ldc, const Epilogue<T>& e) {
  constexpr int64_t W = lanes<T>;
  int64_t c = 0, left = columns / W;
  while (left > 0) {
    if (left == 3 || left == 5) {
      nn_panel<T, 4, 3, NP>(M, K, f, c, C, ldc, e);
      c += 3 * W, left -= 3;
    } else if (left > 1) {
      nn_panel<T, 6, 2, NP>(M, K, f, c, C, ldc, e);
      c += 2 * W, left -= 2;
    } else {
      nn_panel<T, 8, 1, NP>(M, K, f, c, C, ldc, e);
      left = 0;
    }
  }
}

template <class T, int MR, int NI, int NP>
FASTMAML_INLINE void nt_tile(int64_t K, const Factors<T>* f, int64_t m, int64_t i0, T* C, int64_t ldc, const Epilogue<T>& e) {
  using V = Vec<T>;
  V acc[MR][NI];
  FASTMAML_UNROLL(i, MR) { FASTMAML_UNROLL(j, NI) { acc[i][j] = V{}; }); });
  FASTMAML_UNROLL(p, NP) {
    const int64_t a_row = f[p].a_row, ldb = f[p].ldb;
    const T* a = f[p].a + m * a_row;
    const T* b = f[p].b + i0 * ldb;
    for (int64_t k = 0; k < K; k += lanes<T>, a += lanes<T>, b += lanes<T>) {
      V bv[NI];
      FASTMAML_UNROLL(j, NI) { bv[j] = load(b + j * ldb); });
      FASTMAML_UNROLL(i, MR) {
        const V av = load(a + i * a_row);
        FASTMAML_UNROLL(j, NI) { acc[i][j] += av * bv[j]; });
      });
    }
  });
  FASTMAML_UNROLL(i, MR) {
    if constexpr (NI == 4) {
      typedef T Quad __attribute__((vector_size(4 * sizeof(T))));
      Quad q = sum4<T>(acc[i][0], acc[i][1], acc[i][2], acc[i][3]);
      auto read = [](const T* p) __attribute__((always_inline)) {
        Quad v;
        __builtin_memcpy(&v, p, sizeof v);
        return v;
      };
      if (e.bias) q += read(e.bias + i0);
      q = finish<T, Quad>(q, m + i, i0, e, read);
      __builtin_memcpy(C + (m + i) * ldc + i0, &q, sizeof q);
    } else {
      FASTMAML_UNROLL(j, NI) {
        auto read = [](const T* p) __attribute__((always_inline)) { return *p; };
        const T s = sum<T>(acc[i][j]) + (e.bias ? e.bias[i0 + j] : T(0));
        C[(m + i) * ldc + i0 + j] = finish<T, T>(s, m + i, i0 + j, e, read);
      });
    }
  });
}

template <class T, int NI, int NP>
__attribute__((noinline)) void nt_panel(int64_t M, int64_t K, const Factors<T>* f, int64_t i0, T* C, int64_t ldc, const Epilogue<T>& e) {
  row_blocks<3>(M, [&](auto rows, int64_t m) __attribute__((always_inline)) { nt_tile<T, rows, NI, NP>(K, f, m, i0, C, ldc, e); });
}

// K: padded to whole vectors; columns: exact, no more are written
template <class T, int NP>
void nt(int64_t M, int64_t K, int64_t columns, const Factors<T>* f, T* C, int64_t ldc, const Epilogue<T>& e) {
  int64_t i = 0;
  for (; i + 4 <= columns; i += 4) nt_panel<T, 4, NP>(M, K, f, i, C, ldc, e);
  for (; i < columns; ++i) nt_panel<T, 1, NP>(M, K, f, i, C, ldc, e);
}

}  // namespace fastmaml::FASTMAML_ISA
