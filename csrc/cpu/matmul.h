// Small dense products, the work of every linear layer: one output tile in registers, panels that stay in L1.
//   nn   C[m, c] = sum_k A[m, k] B[k, c]      A by broadcast at any strides, B and C by rows
//   nt   C[m, i] = sum_k A[m, k] B[i, k]      both by rows
// Either may be the sum of two products (the tangent of a product is one), and ends as a layer's output or as
// a parameter's.
#pragma once
#include "plan.h"
#include "simd.h"

namespace fastmaml::FASTMAML_ISA {

template <class T>
struct Factors {
  const T* a;
  int64_t a_row, a_col;  // strides of A
  const T* b;
  int64_t ldb;
  int64_t K;  // of the sum over k
};

// A layer's output or input gradient: C = bias + products, or C + products; then (leaky) relu, or the slope
// of the one whose output is `mask`.
template <class T>
struct Activate {
  const T* bias = nullptr;  // [columns]
  bool add = false;
  bool act = false;
  T slope = 0;
  const T* mask = nullptr;  // [rows, ld_mask]
  int64_t ld_mask = 0;
  T mask_slope = 0;

  FASTMAML_INLINE Vec<T> start(int64_t c) const { return bias ? load(bias + c) : Vec<T>{}; }
  FASTMAML_INLINE Vec<T> start_half(int64_t c) const { return bias ? repeat_half(bias + c) : Vec<T>{}; }

  // n vectors of row m from column c on
  template <int n>
  FASTMAML_INLINE void finish(Vec<T> (&acc)[n], int64_t m, int64_t c, T* C, int64_t ldc) const {
    constexpr int W = lanes<T>;
    T* out = C + m * ldc + c;
    if (add) {
      FASTMAML_UNROLL(j, n) { acc[j] += load(out + W * j); });
    }
    if (act) {
      FASTMAML_UNROLL(j, n) { acc[j] = leaky_relu<T>(acc[j], slope); });
    }
    if (mask) {
      const T* y = mask + m * ld_mask + c;
      FASTMAML_UNROLL(j, n) { acc[j] = leaky_relu_grad<T>(acc[j], load(y + W * j), mask_slope); });
    }
    FASTMAML_UNROLL(j, n) { store(out + W * j, acc[j]); });
  }
};

// A parameter's: C = base + scale * products, each number with a scale of its own if there is `scale_each`;
// added to what C holds if `add`
template <class T>
struct Update {
  const T* base;  // as C, may be C; null: 0
  T scale;
  const T* scale_each;  // as C
  bool add = false;

  FASTMAML_INLINE Vec<T> start(int64_t) const { return Vec<T>{}; }
  FASTMAML_INLINE Vec<T> start_half(int64_t) const { return Vec<T>{}; }

  template <int n>
  FASTMAML_INLINE void finish(Vec<T> (&acc)[n], int64_t m, int64_t c, T* C, int64_t ldc) const {
    constexpr int W = lanes<T>;
    const int64_t at = m * ldc + c;
    if (scale_each) {
      FASTMAML_UNROLL(j, n) { acc[j] *= load(scale_each + at + W * j); });
    } else if (!base) {
      FASTMAML_UNROLL(j, n) { acc[j] *= scale; });
    }
    if (base) {
      const Vec<T> s = splat(scale_each ? T(1) : scale);
      FASTMAML_UNROLL(j, n) { acc[j] = load(base + at + W * j) + s * acc[j]; });
    }
    if (add) {
      FASTMAML_UNROLL(j, n) { acc[j] += load(C + at + W * j); });
    }
    FASTMAML_UNROLL(j, n) { store(C + at + W * j, acc[j]); });
  }
};

// The sum of NP products, or with NP = 0 of `count`. half: the second half of the last vector is beyond the
// matrix, and is not read; every two rows share it.
template <class T, int MR, int NV, int NP, bool half, class End>
FASTMAML_INLINE void nn_tile(const Factors<T>* f, int64_t count, int64_t m, int64_t c, T* C, int64_t ldc,
                             const End& e) {
  using V = Vec<T>;
  constexpr int W = lanes<T>, whole = half ? NV - 1 : NV;
  V acc[MR][NV], shared[(MR + 1) / 2];
  FASTMAML_UNROLL(j, whole) {
    const V start = e.start(c + W * j);
    FASTMAML_UNROLL(i, MR) { acc[i][j] = start; });
  });
  if constexpr (half) {
    const V start = e.start_half(c + W * whole);
    FASTMAML_UNROLL(i, (MR + 1) / 2) { shared[i] = start; });
  }
  auto product = [&](const Factors<T>& p) __attribute__((always_inline)) {
    const int64_t a_row = p.a_row, a_col = p.a_col, ldb = p.ldb, K = p.K;
    const T* a = p.a + m * a_row;
    const T* b = p.b + c;
    for (int64_t k = 0; k < K; ++k, a += a_col, b += ldb) {
      V bv[NV];
      // matrices with panels this wide may not fit in L2 (measured: 3 % of the step of a wide network); of
      // several products each has few rows
      if constexpr (NV == 4 && NP > 0) FASTMAML_UNROLL(j, NV) {
          __builtin_prefetch(b + 12 * ldb + W * j);
        });
      FASTMAML_UNROLL(j, whole) { bv[j] = in_register(load(b + W * j)); });
      if constexpr (half) {
        bv[whole] = in_register(repeat_half(b + W * whole));
        FASTMAML_UNROLL(i, (MR + 1) / 2) {
          constexpr int next = 2 * i + 1 < MR ? 2 * i + 1 : 2 * i;
          const V even = in_register(splat(a[2 * i * a_row])), odd = in_register(splat(a[next * a_row]));
          FASTMAML_UNROLL(j, whole) {
            acc[2 * i][j] += even * bv[j];
            if constexpr (next > 2 * i) acc[next][j] += odd * bv[j];
          });
          shared[i] += two_halves<T>(even, odd) * bv[whole];
        });
      } else {
        FASTMAML_UNROLL(i, MR) {
          const V av = splat(a[i * a_row]);
          FASTMAML_UNROLL(j, NV) { acc[i][j] += av * bv[j]; });
        });
      }
    }
  };
  if constexpr (NP > 0) FASTMAML_UNROLL(p, NP) {
      product(f[p]);
    });
  else for (int64_t p = 0; p < count; ++p) product(f[p]);
  if constexpr (half) FASTMAML_UNROLL(i, MR) {
      acc[i][whole] = one_half<i % 2, T>(shared[i / 2]);
    });
  FASTMAML_UNROLL(i, MR) { e.finish(acc[i], m + i, c, C, ldc); });
}

// M rows in blocks of at most MR, as even as they go (10 = 5 + 5)
template <int MR, class Tile>
FASTMAML_INLINE void row_blocks(int64_t M, Tile tile) {
  const int64_t blocks = (M + MR - 1) / MR, least = M <= MR ? M : M / blocks, more = M - least * blocks;
  for (int64_t b = 0, m = 0; b < blocks; ++b) {
    const int64_t rows = least + (b < more);
    FASTMAML_UNROLL(i, MR) {
      if (rows == i + 1) tile(std::integral_constant<int, i + 1>(), m);
    });
    m += rows;
  }
}

// Rows of a tile that is NV vectors wide, or pairs of them: as many as leave registers for NV vectors of B
// and one number of A, or two.
template <int NV>
constexpr int nn_rows = std::min((registers - NV - 1) / NV, 8);
template <int NV>
constexpr int nn_pairs = std::min((registers - NV - 2) / (2 * NV - 1), 5);

template <class T, int NV, int NP, bool half, class End>
__attribute__((noinline)) void nn_panel(int64_t M, const Factors<T>* f, int64_t count, int64_t c, T* C,
                                        int64_t ldc, const End& e) {
  if constexpr (half) {
    row_blocks<nn_pairs<NV>>(
        M / 2, [&](auto pairs, int64_t pair) __attribute__((always_inline)) {
          nn_tile<T, 2 * pairs, NV, NP, true>(f, count, 2 * pair, c, C, ldc, e);
        });
    if (M % 2) nn_tile<T, 1, NV, NP, true>(f, count, M - 1, c, C, ldc, e);
  } else {
    row_blocks<nn_rows<NV>>(
        M, [&](auto rows, int64_t m) __attribute__((always_inline)) {
          nn_tile<T, rows, NV, NP, false>(f, count, m, c, C, ldc, e);
        });
  }
}

// panel(vectors, first column) for panels of at most 4 vectors (3 where registers are few), and none of one
// vector where it can be avoided
template <class T, class Panel>
FASTMAML_INLINE void column_panels(int64_t columns, Panel panel) {
  constexpr int64_t W = lanes<T>;
  constexpr int widest = registers >= 32 ? 4 : 2;
  int64_t c = 0, left = (columns + W - 1) / W;
  auto next = [&](auto vectors) {
    panel(vectors, c);
    c += vectors * W, left -= vectors;
  };
  while (left > 0) {
    if (left == 3 || left == 5 || (left == 6 && widest > 2))
      next(std::integral_constant<int, 3>());
    else if (left >= widest)
      next(std::integral_constant<int, widest>());
    else if (left == 2)
      next(std::integral_constant<int, 2>());
    else
      next(std::integral_constant<int, 1>());
  }
}

// panel(vectors, half, first column): the panels above, and whether half of the last vector or more of one is
// beyond the matrix
template <class T, class Panel>
FASTMAML_INLINE void nn_panels(int64_t columns, Panel panel) {
  constexpr int64_t W = lanes<T>;
  const bool half = W >= 4 && columns % W > 0 && columns % W <= W / 2;
  column_panels<T>(columns, [&](auto vectors, int64_t c) {
    if constexpr (W >= 4)
      if (half && c + vectors * W > columns) return panel(vectors, std::true_type(), c);
    panel(vectors, std::false_type(), c);
  });
}

// columns: exact; B is padded with zeros to whole vectors, as is C
template <class T, int NP, class End>
void nn(int64_t M, int64_t columns, const Factors<T>* f, T* C, int64_t ldc, const End& e,
        int64_t count = NP) {
  nn_panels<T>(columns, [&](auto vectors, auto half, int64_t c) {
    nn_panel<T, vectors, NP, half>(M, f, count, c, C, ldc, e);
  });
}

// The bare sums of MR x NI outputs: NI is 4, or 1 and then MR at most 4
template <class T, int MR, int NI, int NP>
FASTMAML_INLINE void dots_tile(int64_t K, const Factors<T>* f, int64_t m, int64_t i0, T* C, int64_t ldc,
                               bool add) {
  using V = Vec<T>;
  V acc[MR][NI];
  FASTMAML_UNROLL(i, MR) {
    FASTMAML_UNROLL(j, NI) { acc[i][j] = V{}; });
  });
  FASTMAML_UNROLL(p, NP) {
    const int64_t a_row = f[p].a_row, ldb = f[p].ldb;
    const T* a = f[p].a + m * a_row;
    const T* b = f[p].b + i0 * ldb;
    for (int64_t k = 0; k < K; k += lanes<T>, a += lanes<T>, b += lanes<T>) {
      V av[MR];
      FASTMAML_UNROLL(i, MR) { av[i] = in_register(load(a + i * a_row)); });
      FASTMAML_UNROLL(j, NI) {
        const V bv = in_register(load(b + j * ldb));
        FASTMAML_UNROLL(i, MR) { acc[i][j] += av[i] * bv; });
      });
    }
  });
  T* out = C + m * ldc + i0;
  if constexpr (NI == 4) {
    FASTMAML_UNROLL(i, MR) {
      auto q = sum4<T>(acc[i]);
      if (add) {
        decltype(q) old;
        __builtin_memcpy(&old, out + i * ldc, sizeof old);
        q += old;
      }
      __builtin_memcpy(out + i * ldc, &q, sizeof q);
    });
  } else {
    V column[4] = {};
    FASTMAML_UNROLL(i, MR) { column[i] = acc[i][0]; });
    const auto q = sum4<T>(column);
    FASTMAML_UNROLL(i, MR) { out[i * ldc] = add ? out[i * ldc] + q[(int)i] : q[(int)i]; });
  }
}

template <class T, int MR, int NI, int NP>
__attribute__((noinline)) void dots_panel(int64_t M, int64_t K, const Factors<T>* f, int64_t i0, T* C,
                                          int64_t ldc, bool add) {
  row_blocks<MR>(
      M, [&](auto rows, int64_t m)
             __attribute__((always_inline)) { dots_tile<T, rows, NI, NP>(K, f, m, i0, C, ldc, add); });
}

// From column i on. What follows the products is done on whole rows of C when they are complete: at four
// numbers a time it would take as long as the products.
template <class T, int NP>
void dots(int64_t M, int64_t K, int64_t i, int64_t columns, const Factors<T>* f, T* C, int64_t ldc,
          Activate<T> e) {
  const int64_t begin = i;
  for (; i + 4 <= columns; i += 4) dots_panel<T, registers == 32 ? 5 : 3, 4, NP>(M, K, f, i, C, ldc, e.add);
  for (; i < columns; ++i) dots_panel<T, 4, 1, NP>(M, K, f, i, C, ldc, e.add);
  if (!e.bias && !e.act && !e.mask) return;
  e.add = false;
  for (int64_t m = 0; m < M; ++m) {
    for (int64_t c = begin; c < columns; c += lanes<T>) {
      Vec<T> row[1] = {e.start(c) + load(C + m * ldc + c)};
      e.template finish<1>(row, m, c, C, ldc);
    }
  }
}

template <class T, int n, bool all>
FASTMAML_INLINE void transpose_some(int64_t K, int64_t some, const T* from, int64_t ld_from, T* to,
                                    int64_t ld_to) {
  constexpr auto lane = std::make_integer_sequence<int, n>();
  const T* group[n / 4];  // of four columns
  const auto is_there = [&](int64_t column) { return all || column < some; };
  FASTMAML_UNROLL(j, n / 4) { group[j] = from + (is_there(4 * j) ? 4 * j : 0) * ld_from; });
  for (int64_t k = 0; k < K; k += 4, to += 4 * ld_to) {
    auto quad = [&](int64_t q) __attribute__((always_inline)) {
      const T* column[n / 4];
      FASTMAML_UNROLL(j, n / 4) { column[j] = group[j] + (is_there(4 * j + q) ? q * ld_from : 0); });
      return quads<T, n / 4>(column);
    };
    auto put = [&](int64_t row, auto v) __attribute__((always_inline)) {
      if constexpr (!all) v = first_of<T>(v, some, lane);
      __builtin_memcpy(to + row * ld_to, &v, sizeof v);
    };
    const auto a = quad(0), b = quad(1), c = quad(2), d = quad(3);
    const auto ab = interleave<1, 0>(a, b, lane), cd = interleave<1, 0>(c, d, lane);
    put(0, interleave<2, 0>(ab, cd, lane));
    put(1, interleave<2, 1>(ab, cd, lane));
    const auto ab_high = interleave<1, 1>(a, b, lane), cd_high = interleave<1, 1>(c, d, lane);
    put(2, interleave<2, 0>(ab_high, cd_high, lane));
    put(3, interleave<2, 1>(ab_high, cd_high, lane));
    for (const T*& at : group) at += 4;
  }
}

// to[k, c] = from[c, k] for n columns: a vector of them, or half of one. Only `some` of them exist, and are
// read: 0 for the others. K: up to the next multiple of four.
template <class T, int n>
FASTMAML_INLINE void transpose(int64_t K, int64_t some, const T* from, int64_t ld_from, T* to,
                               int64_t ld_to) {
  if (some >= n)
    transpose_some<T, n, true>(K, n, from, ld_from, to, ld_to);
  else
    transpose_some<T, n, false>(K, some, from, ld_from, to, ld_to);
}

// nt for a panel of columns, as nn with B transposed, a piece that stays in L1 at a time.
template <class T, int NV, int NP, bool half>
__attribute__((noinline)) void nt_panel(int64_t M, int64_t K, const Factors<T>* f, int64_t c, int64_t columns,
                                        T* C, int64_t ldc, const Activate<T>& e) {
  constexpr int64_t W = lanes<T>, width = NV * W, most = 64;
  alignas(64) T scratch[NP * most * width];
  const int64_t pieces = (K + most - 1) / most, step = round_up((K + pieces - 1) / pieces, 4);
  for (int64_t k = 0; k < K; k += step) {
    const int64_t deep = std::min(step, K - k);
    Factors<T> piece[NP];
    for (int p = 0; p < NP; ++p) {
      T* const to = scratch + p * most * width;
      const T* const from = f[p].b + c * f[p].ldb + k;
      FASTMAML_UNROLL(j, NV) {
        constexpr int n = half && j == NV - 1 ? W / 2 : W;
        const int64_t some = columns - c - j * W, ldb = f[p].ldb;
        transpose<T, n>(deep, some, from + j * W * ldb, ldb, to + j * W, width);
      });
      piece[p] = {f[p].a + k, f[p].a_row, 1, to - c, width, deep};
    }
    Activate<T> part = e;
    if (k > 0) part.bias = nullptr, part.add = true;
    if (k + deep < K) part.act = false, part.mask = nullptr;
    nn_panel<T, NV, NP, half>(M, piece, NP, c, C, ldc, part);
  }
}

// K and columns: exact, but both operands padded with zeros to whole vectors, as is C unless it is `exact`:
// then nothing is written behind its columns.
template <class T, int NP>
void nt(int64_t M, int64_t columns, const Factors<T>* f, T* C, int64_t ldc, const Activate<T>& e,
        bool exact = false) {
  constexpr int64_t W = lanes<T>;
  const int64_t K = f[0].K;
  int64_t done = 0;
  if constexpr (W >= 4)
    if (K <= 4 * M && columns >= W) {  // rows enough to pay for the transposition
      // the rest of a vector, unless it is few enough for dots
      const bool rest = !exact && columns % W >= W / 4;
      done = rest ? columns : columns / W * W;
      nn_panels<T>(done, [&](auto vectors, auto half, int64_t c) {
        nt_panel<T, vectors, NP, half && W >= 8>(M, K, f, c, done, C, ldc, e);
      });
    }
  if (done < columns) dots<T, NP>(M, round_up(K, W), done, columns, f, C, ldc, e);
}

}  // namespace fastmaml::FASTMAML_ISA
