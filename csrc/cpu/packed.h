// A matrix that many rows are multiplied with.
#pragma once
#include "amx.h"
#include "arena.h"
#include "matmul.h"

namespace fastmaml::FASTMAML_ISA {

// Can products of T be made on the matrix unit? Its machines have AVX-512.
template <class T>
constexpr bool has_amx = std::is_same_v<T, float>&& FASTMAML_VECTOR_BYTES == 64;

// A matrix [K, columns] cut into the panels of columns that nn_panel takes, each contiguous; or for amx.h.
template <class T>
struct Packed {
  int64_t K, columns;
  bool on_amx;
  T* data;

  // rows: of what it is multiplied with
  static bool uses_amx(int64_t rows, int64_t K, int64_t columns) {
    if constexpr (has_amx<T>) return amx::enabled() && amx::pays(rows, K, columns);
    return false;
  }
  static int64_t size(bool on_amx, int64_t K, int64_t columns) {
    if (on_amx) return amx::size(columns, K) * sizeof(amx::Part) / sizeof(T);
    return K * round_up(columns, lanes<T>);
  }

  // the panel of columns c .. c + width of from[k * row + column * step]; one of both is 1
  void fill(int64_t c, int64_t width, const T* from, int64_t row, int64_t step) const {
    if constexpr (has_amx<T>)
      if (on_amx) {
        const int64_t end = c + width < columns ? c + width : round_up(columns, amx::side);
        amx::pack(amx::Factor::b, row == 1, {from, std::max(row, step)}, c / 16, end / 16, columns, K,
                  parts());
        return;
      }
    T* const panel = data + K * c;
    const int64_t some = std::min(width, columns - c);
    int64_t k0 = 0;
    if constexpr (lanes<T> >= 4)
      for (; row == 1 && k0 + 16 <= K; k0 += 16)
        for (int64_t j = 0; j < width; j += lanes<T>)
          transpose<T, lanes<T>>(16, some - j, from + (c + j) * step + k0, step, panel + k0 * width + j,
                                 width);
    for (; k0 < K; k0 += 16)
      for (int64_t j = 0; j < width; ++j)
        for (int64_t k = k0; k < std::min(k0 + 16, K); ++k)
          panel[k * width + j] = j < some ? from[k * row + (c + j) * step] : T(0);
  }

  // C = e(A this) for A [M, K], without a bias. A block of A that fits in L2 meets every panel; a piece of a
  // panel that fits in L1 meets all rows of the block before the next.
  void times(int64_t M, const T* a, int64_t lda, T* C, int64_t ldc, const Activate<T>& e) const {
    if constexpr (has_amx<T>)
      if (on_amx) return amx_times(M, a, lda, C, ldc, e);
    const int64_t deep = (K + 1023) / 1024, fit = std::max<int64_t>((768 << 10) * deep / (K * sizeof(T)), 1),
                  high = (M + fit - 1) / fit;
    for (int64_t i = 0; i < deep; ++i) {
      const int64_t k = K * i / deep, k_end = K * (i + 1) / deep;
      for (int64_t j = 0; j < high; ++j) {
        const int64_t m = M * j / high, rows = M * (j + 1) / high - m;
        Activate<T> end = e;
        if (e.mask) end.mask += m * e.ld_mask;
        column_panels<T>(columns, [&](auto vectors, int64_t c) {
          panel<vectors>(rows, k, k_end, a + m * lda, lda, c, C + m * ldc, ldc, end);
        });
      }
    }
  }

 private:
  template <int vectors>
  void panel(int64_t M, int64_t k_begin, int64_t k_end, const T* a, int64_t lda, int64_t c, T* C, int64_t ldc,
             const Activate<T>& e) const {
    constexpr int64_t width = vectors * lanes<T>, most = (32 << 10) / (width * sizeof(T));
    const int64_t deep = k_end - k_begin, pieces = (deep + most - 1) / most;
    for (int64_t i = 0; i < pieces; ++i) {
      const int64_t k = k_begin + deep * i / pieces, end = k_begin + deep * (i + 1) / pieces;
      Activate<T> part = e;
      if (k > 0) part.add = true;
      if (end < K) part.act = false, part.mask = nullptr;
      const Factors<T> f{a + k, lda, 1, data + K * c + k * width - c, width, end - k};
      nn_panel<T, vectors, 1, false>(M, &f, 1, c, C, ldc, part);
    }
  }

  amx::Part* parts() const { return reinterpret_cast<amx::Part*>(data); }

  // Blocks of A that stay in L2, split once for all columns.
  void amx_times(int64_t M, const T* a, int64_t lda, T* C, int64_t ldc, const Activate<T>& e) const {
    constexpr int64_t most = 128, depth = 1024, side = amx::side;
    const int64_t high = (M + most - 1) / most, step = round_up((M + high - 1) / high, 16);
    const Arena memory((side * side * sizeof(T) + amx::size(step, std::min(K, depth)) * sizeof(amx::Part)));
    T* const sum = static_cast<T*>(memory.data());
    amx::Part* const split = reinterpret_cast<amx::Part*>(sum + side * side);
    const amx::Tiles tiles;
    for (int64_t m = 0; m < M; m += step) {
      const int64_t rows = std::min(step, M - m);
      for (int64_t k = 0; k < K; k += depth) {
        const int64_t deep = std::min(depth, K - k), count = amx::blocks(deep);
        amx::pack(amx::Factor::a, true, {a + m * lda + k, lda}, 0, (rows + 15) / 16, rows, deep, split);
        Activate<T> part = e;
        if (k > 0) part.add = true;
        if (k + deep < K) part.act = false, part.mask = nullptr;
        for (int64_t c = 0; c < columns; c += side)
          for (int64_t r = 0; r < rows; r += side) {
            const amx::Part* const b = parts() + (c / side * amx::blocks(K) + k / side) * amx::block;
            amx::Ahead ahead;  // the next panel of B, a share of it with each block of rows
            if (c + side < columns)
              ahead = amx::Ahead::share(b + amx::blocks(K) * amx::block, count, r / side, amx::blocks(rows));
            amx::multiply(split + r / side * count * amx::block, b, count, rows - r <= 16, false, sum, side,
                          ahead);
            for (int64_t i = 0; i < std::min(side, rows - r); ++i) {
              Vec<T> two[2] = {load(sum + i * side), load(sum + i * side + lanes<T>)}, one[1] = {two[0]};
              if (columns - c > lanes<T>)
                part.finish(two, m + r + i, c, C, ldc);
              else
                part.finish(one, m + r + i, c, C, ldc);
            }
          }
      }
    }
  }
};

}  // namespace fastmaml::FASTMAML_ISA
