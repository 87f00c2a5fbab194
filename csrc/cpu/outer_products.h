// The sum of outer products that a factored layer's gradient is.
#pragma once
#include "packed.h"

namespace fastmaml::FASTMAML_ISA {

// The gradient of a factored layer's theta [O, I]: minus the sum of its outer products d^T x.
template <class T>
struct OuterProducts {
  // The block of it that is made at once, of even parts of its rows and columns, and how many rows of d and x
  // are multiplied before the next: d's part is packed, x's stays in L2 while the block's rows go over it,
  // and is read again for as few blocks as can be. On the matrix unit both are packed, and L2 holds them and
  // the block.
  static constexpr int64_t most_rows = 256, fma_columns = 448, amx_columns = 512, most = 128;

  int64_t I;
  bool on_amx;
  int64_t rows, columns;
  std::vector<Factors<T>> products = {};
  std::vector<int64_t> ends = {};  // of the products done at once
  int64_t filled = 0;

  // of `all` rows of d and x
  OuterProducts(int64_t all, int64_t O, int64_t I)
      : I(I),
        on_amx(Packed<T>::uses_amx(O, all, I)),
        rows(even_part(O, most_rows)),
        columns(even_part(I, on_amx ? amx_columns : fma_columns)) {}

  // what is added between two calls of close() is summed in an order of its own
  void add(const T* d, int64_t ldd, const T* x, int64_t ldx, int64_t n) {
    for (int64_t r = 0; r < n;) {
      const int64_t some = std::min(n - r, most - filled);
      products.push_back({d + r * ldd, 1, ldd, x + r * ldx, ldx, some});
      r += some, filled += some;
      if (filled == most) close();
    }
  }
  void close() {
    if ((ends.empty() ? 0 : ends.back()) < static_cast<int64_t>(products.size()))
      ends.push_back(products.size());
    filled = 0;
  }

  static int64_t scratch_size() {
    const int64_t parts = amx::size(most_rows, most) + amx::size(amx_columns, most);
    const int64_t on_fma = (most_rows + most) * fma_columns + most * most_rows,
                  on_amx = most_rows * amx_columns + parts * sizeof(amx::Part) / sizeof(T);
    return Packed<T>::uses_amx(1 << 20, 1 << 20, 1 << 20) ? std::max(on_fma, on_amx) : on_fma;
  }

  // its `o_size` rows from o on and `i_size` columns from i on
  void write(int64_t o, int64_t o_size, int64_t i, int64_t i_size, T* out, bool add, T* scratch) const {
    T* const sum = scratch;
    for (int64_t r = 0; r < (add ? o_size : 0); ++r) {  // goes on from the round before
      const T* const from = out + (o + r) * I + i;
      for (int64_t c = 0; c < i_size; ++c) sum[r * columns + c] = -from[c];
    }
    int64_t begin = 0;
    for (const int64_t end : ends) {
      const bool first = begin == 0 && !add;
      if (on_amx)
        sum_on_amx(begin, end, o, o_size, i, i_size, first, sum);
      else
        sum_up(begin, end, o, o_size, i, i_size, first, sum);
      begin = end;
    }
    for (int64_t r = 0; r < o_size; ++r) {
      T* const to = out + (o + r) * I + i;
      for (int64_t c = 0; c < i_size; ++c) to[c] = ends.empty() && !add ? T(0) : -sum[r * columns + c];
    }
  }

 private:
  static int64_t even_part(int64_t n, int64_t at_most) {
    const int64_t parts = (n + at_most - 1) / at_most;
    return round_up((n + parts - 1) / std::max<int64_t>(parts, 1), 64);
  }

  // sum [rows, columns] += the products from `begin` to `end`, or = if they are the first; scratch follows it
  void sum_up(int64_t begin, int64_t end, int64_t o, int64_t o_size, int64_t i, int64_t i_size, bool first,
              T* sum) const {
    T *const packed = sum + rows * columns, *const packed_x = packed + most * rows;
    T* at = packed;
    int64_t depth = 0;
    for (int64_t j = begin; j < end; ++j) {
      const Factors<T>& p = products[j];
      for (int64_t r = 0; r < p.K; ++r, at += rows)
        std::memcpy(at, p.a + r * p.a_col + o, o_size * sizeof(T));
      depth += p.K;
    }
    column_panels<T>(i_size, [&](auto vectors, int64_t c) {
      constexpr int64_t width = vectors * lanes<T>;
      T* const x = packed_x + most * c;
      for (int64_t j = begin, r = 0; j < end; ++j)
        for (int64_t k = 0; k < products[j].K; ++k, ++r) {
          const T* const from = products[j].b + k * products[j].ldb + i + c;
          FASTMAML_UNROLL(v, vectors) {
            store(x + r * width + v * lanes<T>, load(from + v * lanes<T>));
            __builtin_prefetch(from + width + v * lanes<T>);  // the next panel's
          });
        }
      const Factors<T> f{packed, 1, rows, x - c, width, depth};
      nn_panel<T, vectors, 1, false>(o_size, &f, 1, c, sum, columns,
                                     Update<T>{first ? nullptr : sum, T(1), nullptr});
    });
  }

  void sum_on_amx(int64_t begin, int64_t end, int64_t o, int64_t o_size, int64_t i, int64_t i_size,
                  bool first, T* sum) const {
    if constexpr (has_amx<T>) {
      amx::Part* const d = reinterpret_cast<amx::Part*>(sum + rows * columns);
      amx::Part* const x = d + amx::size(rows, most);
      const T *d_rows[most], *x_rows[most];
      int64_t depth = 0;
      for (int64_t j = begin; j < end; ++j)
        for (int64_t k = 0; k < products[j].K; ++k, ++depth) {
          d_rows[depth] = products[j].a + k * products[j].a_col + o;
          x_rows[depth] = products[j].b + k * products[j].ldb + i;
        }
      amx::pack(amx::Factor::a, false, {nullptr, 0, d_rows}, 0, 2 * amx::blocks(o_size), o_size, depth, d);
      amx::pack(amx::Factor::b, false, {nullptr, 0, x_rows}, 0, 2 * amx::blocks(i_size), i_size, depth, x);
      const amx::Tiles tiles;
      const int64_t count = amx::blocks(depth);
      for (int64_t c = 0; c < i_size; c += amx::side)
        for (int64_t r = 0; r < o_size; r += amx::side)
          amx::multiply(d + r / amx::side * count * amx::block, x + c / amx::side * count * amx::block, count,
                        o_size - r <= 16, !first, sum + r * columns + c, columns);
    }
  }
};

}  // namespace fastmaml::FASTMAML_ISA
