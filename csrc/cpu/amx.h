// float32 products on the matrix unit (AMX), which multiplies tiles of bfloat16 and adds up in float32. A
// float32 is the sum of three bfloat16 of 8 bits each, exactly: a = a0 + a1 + a2, |a1| <= 2^-8 |a|,
// |a2| <= 2^-17 |a|, and
//   a b = a0 b0 + (a0 b1 + a1 b0) + (a0 b2 + a1 b1 + a2 b0) + at most 2^-24 |a b|
// the error of one rounding: six products, which take the unit half the time of one fused multiply-add.
// What the unit takes for 0 are numbers below 2^-126, among them the parts of some below 2^-102: such a
// factor has an absolute error of up to 2^-126. Infinities, and numbers above 3.396e38, come out as NaN.
#pragma once
#include <cstdint>

namespace fastmaml::amx {

// Are products to be made on it? enable() asks the system for it, and says whether it is there.
bool enable();
bool enabled();

// Is the product of matrices [M, K] and [K, N] faster on it? Measured against fused multiply-adds: 1.2 times
// at 32, 256, 64, 1.6 times at 80, 256, 256, 1.8 times at 80, 1000, 1000; with 16 rows or 48 columns no
// faster, with one row half as fast.
inline bool pays(int64_t M, int64_t K, int64_t N) { return M >= 32 && K >= 32 && N >= 64; }

// The factors A [lines, K] and B [K, lines] of a product lie in blocks of 32 lines and 32 k, three parts
// each, those of 32 lines one after another.
using Part = uint16_t;
constexpr int64_t side = 32, tile = 16 * side, block = 3 * 2 * tile;
inline int64_t blocks(int64_t n) { return (n + side - 1) / side; }
inline int64_t size(int64_t lines, int64_t K) { return blocks(lines) * blocks(K) * block; }

// A matrix by rows of contiguous numbers, from `base` on or each at an address of its own.
struct Rows {
  const float* base;
  int64_t ld;
  const float* const* each = nullptr;

  const float* operator[](int64_t r) const { return each ? each[r] : base + r * ld; }
};

enum class Factor { a, b };

// Splits the lines from 16 begin to 16 end, zeros from `lines` on and beyond K. lines_are_rows: of the
// matrix, which has a row for each k else.
void pack(Factor factor, bool lines_are_rows, const Rows& from, int64_t begin, int64_t end, int64_t lines,
          int64_t K, Part* to);

// The unit's registers are this thread's while such an object lives.
class Tiles {
 public:
  Tiles();
  ~Tiles();
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// Blocks that the next products will read, from L3: with each of the six products of a pair of blocks `lines`
// cache lines of them are fetched.
struct Ahead {
  const Part* at = nullptr;
  int64_t lines = 0;

  // the i-th of n shares of `count` blocks
  static Ahead share(const Part* at, int64_t count, int64_t i, int64_t n) {
    const int64_t line = 64 / sizeof(Part), lines = block / line / 6 / n;
    return {at + i * count * 6 * lines * line, lines};
  }
};

// C [32, 32] = the product of `count` blocks of A and B, added to C if `add`; of 16 rows if `half`. It reads
// and writes all of C.
void multiply(const Part* a, const Part* b, int64_t count, bool half, bool add, float* C, int64_t ldc,
              Ahead ahead = {});

}  // namespace fastmaml::amx
