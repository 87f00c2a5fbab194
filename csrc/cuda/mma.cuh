// Products of float matrices on tensor cores, a tile of 16 x 8 to a warp: operands rounded to TF32 or
// bfloat16, float32 sums. What one instruction does is multiply_add of device.h, or of emulation/device.h.
//
// Lane l holds numbers of row l / 4 of the rows of A and of the columns of B, in registers of one TF32 number
// or two of bfloat16 that are neighbours along the sum: register l % 4 and, further on, l % 4 + 4. The sums
// of a lane are two neighbours in rows l / 4 and l / 4 + 8. (PTX ISA, "Matrix Fragments for mma.m16n8k8 /
// m16n8k16")
#pragma once
#include "team.cuh"

namespace fastmaml::cuda::FASTMAML_TEAM {

template <Precision P>
constexpr int in_register = P == bf16 ? 2 : 1;
constexpr int tile_rows = 16, tile_columns = 8;
template <Precision P>
constexpr int tile_depth = 8 * in_register<P>;

// a lane's numbers of a tile of sums
using TileSums = Vec<float, 2>[2];

FASTMAML_DEVICE int tile_row() { return lane() / 4; }
FASTMAML_DEVICE int tile_column() { return 2 * (lane() % 4); }

// A register of the numbers of(i, k), of(i, k + 1), ..
template <Precision P, class F>
FASTMAML_DEVICE uint32_t rounded(const F& of, int i, int k) {
  if constexpr (P == tf32)
    return to_tf32(of(i, k));
  else
    return to_bf16(of(i, k), of(i, k + 1));
}
// This lane's part of A (4 registers, rows from i on) or B (2 registers, columns from i on), from k on.
template <Precision P, int n, class F>
FASTMAML_DEVICE void load_fragment(uint32_t (&to)[n], const F& of, int i, int k) {
#pragma unroll
  for (int r = 0; r < n; ++r) {
    const int lower = n == 4 ? r % 2 : 0, further = n == 4 ? r / 2 : r;
    to[r] = rounded<P>(of, i + lane() / 4 + 8 * lower, k + in_register<P> * (lane() % 4 + 4 * further));
  }
}

// sum += A B and t_sum += t_A B + A t_B, on the tile from `row` and `column` on, over `depth` numbers. a(row,
// k) and b(column, k) are zero outside of the matrices; what is outside of one may be anything in memory.
// moves_a, moves_b: is there such a tangent?
template <bool Plain, bool Dual, Precision P, class A, class TangentA, class B, class TangentB>
FASTMAML_DEVICE void multiply_tile(int row, int column, int depth, const A& a, const TangentA& t_a,
                                   const B& b, const TangentB& t_b, bool moves_a, bool moves_b, TileSums& sum,
                                   TileSums& t_sum) {
  for (int k = 0; k < depth; k += tile_depth<P>) {
    uint32_t part_a[4], part_b[2];
    load_fragment<P>(part_a, a, row, k);
    load_fragment<P>(part_b, b, column, k);
    if (Plain) multiply_add<P>(sum, part_a, part_b);
    if (Dual && moves_a) {
      uint32_t tangent[4];
      load_fragment<P>(tangent, t_a, row, k);
      multiply_add<P>(t_sum, tangent, part_b);
    }
    if (Dual && moves_b) {
      uint32_t tangent[2];
      load_fragment<P>(tangent, t_b, column, k);
      multiply_add<P>(t_sum, part_a, tangent);
    }
  }
}

// f(row, column) for where each tile begins, one to a warp at a time
template <class F>
FASTMAML_DEVICE void each_tile(int rows, int columns, const F& f) {
  const int wide = divide_up(columns, tile_columns), tiles = divide_up(rows, tile_rows) * wide;
  for (int tile = warp(); tile < tiles; tile += warps())
    f(tile / wide * tile_rows, tile % wide * tile_columns);
}

}  // namespace fastmaml::cuda::FASTMAML_TEAM
