#include "amx.h"

#include <atomic>

#if defined(__x86_64__) && defined(__linux__) && \
    (__has_include(<amxbf16intrin.h>) || (defined(__clang__) && __has_include(<amxintrin.h>)))
#  include <cpuid.h>
#  include <immintrin.h>
#  include <sys/syscall.h>
#  include <unistd.h>

#  include <algorithm>
#  include <utility>

#  if defined(__clang__)
#    pragma clang attribute push(__attribute__((target("avx512f,avx512bw,amx-tile,amx-bf16"))), \
                                 apply_to = function)
#  else
#    pragma GCC target("avx512f,avx512bw,amx-tile,amx-bf16,prefer-vector-width=512")
#  endif

namespace fastmaml::amx {
namespace {

std::atomic<bool> is_enabled{false};

bool machine_has_it() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool bf16 = d >> 22 & 1, tiles = d >> 24 & 1;
  return bf16 && tiles && __builtin_cpu_supports("avx512bw");
}

// The tiles are 8 KiB more for the system to save when it switches threads: it wants to be asked.
bool system_permits() {
  constexpr int request_permission = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

// Eight registers of 16 rows of 64 bytes. In constant memory: gcc 12 thinks that only its start is read.
struct alignas(64) Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
constexpr Config config;
// gcc 12 takes these in no constructor or destructor
void configure() { _tile_loadconfig(&config); }
void release() { _tile_release(); }

typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Bits __attribute__((vector_size(64)));

// Pairs of numbers of one line in 32 bits each: (v0[i], v1[i]). Rounded to nearest, ties up, so that the
// products left out have no sign in common. The parts of B lie last first, in the order of their use.
template <Factor factor>
inline void split(Floats v0, Floats v1, Part* to) {
  constexpr uint32_t half = 0x8000, upper = 0xffff0000;
  for (int part = 0; part < 3; ++part) {
    Bits r0 = (Bits)v0, r1 = (Bits)v1;
    if (part < 2) {
      r0 = (r0 + half) & upper, r1 = (r1 + half) & upper;
      v0 -= (Floats)r0, v1 -= (Floats)r1;
    }
    const Bits both = r0 >> 16 | (r1 & upper);
    __builtin_memcpy(to + (factor == Factor::a ? part : 2 - part) * 2 * tile, &both, sizeof both);
  }
}

// [a b; c d] to [a c; b d] in every square of 2 x `by` numbers of two rows
template <int by, int... i>
inline void exchange(Floats& upper, Floats& lower, std::integer_sequence<int, i...>) {
  const Floats first = __builtin_shufflevector(upper, lower, (i & by ? 16 + i - by : i)...);
  lower = __builtin_shufflevector(upper, lower, (i & by ? 16 + i : i + by)...);
  upper = first;
}
template <int by>
inline void exchange(Floats (&v)[16]) {
  for (int i = 0; i < 16; ++i)
    if (!(i & by)) exchange<by>(v[i], v[i + by], std::make_integer_sequence<int, 16>());
}
inline void transpose(Floats (&v)[16]) { exchange<1>(v), exchange<2>(v), exchange<4>(v), exchange<8>(v); }

inline __mmask16 first(int64_t n) {
  return static_cast<__mmask16>((1u << std::clamp<int64_t>(n, 0, 16)) - 1);
}

// 2 x 16 rows of 16 numbers, from address at[i] + offset, and what is there of them.
struct Source {
  const float* at[32];
  int64_t rows[2], columns[2];

  bool full() const { return std::min({rows[0], rows[1], columns[0], columns[1]}) >= 16; }
};

// 16 lines and 32 k. In a tile of A a row is a line, in one of B it is two k.
template <Factor factor, bool transposed, bool full>
void pack_tile(const Source& from, int64_t offset, Part* to) {
  const __mmask16 mask[2] = {first(from.columns[0]), first(from.columns[1])};
  auto row = [&](int64_t j, int64_t i) __attribute__((always_inline)) {
    const float* const at = from.at[16 * j + i] + offset;
    return (Floats)(full ? _mm512_loadu_ps(at) : _mm512_maskz_loadu_ps(i < from.rows[j] ? mask[j] : 0, at));
  };
  if (!transposed) {
    for (int i = 0; i < 16; ++i) split<factor>(row(0, i), row(1, i), to + i * side);
    return;
  }
  Floats v[2][16];
  for (int j = 0; j < 2; ++j) {
    for (int i = 0; i < 16; ++i) v[j][i] = row(j, i);
    transpose(v[j]);
  }
  for (int i = 0; i < 16; ++i) split<factor>(v[0][i], v[1][i], to + i * side);
}

// What B is may lie in L3: half of its next block is fetched by hand, the other half comes along.
inline void fetch(const Part* next, const Part* far, int64_t lines) {
  for (int i = 0; i < 8; ++i) _mm_prefetch(reinterpret_cast<const char*>(next + 32 * i), _MM_HINT_T0);
  for (int64_t i = 0; i < lines; ++i) _mm_prefetch(reinterpret_cast<const char*>(far + 32 * i), _MM_HINT_T1);
}

template <bool half>
void multiply(const Part* a, const Part* b, int64_t count, bool add, float* C, int64_t ldc, Ahead ahead) {
  const int64_t row = ldc * static_cast<int64_t>(sizeof(float));
  float* const low = C + 16 * ldc;
  if (add) {
    _tile_loadd(0, C, row);
    _tile_loadd(1, C + 16, row);
    if (!half) _tile_loadd(2, low, row);
    if (!half) _tile_loadd(3, low + 16, row);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if (!half) _tile_zero(2);
    if (!half) _tile_zero(3);
  }
#  define LOAD_A(part)                       \
    _tile_loadd(4, a + part * 2 * tile, 64); \
    if (!half) _tile_loadd(5, a + (part * 2 + 1) * tile, 64)
#  define LOAD_B(part)                             \
    _tile_loadd(6, b + (2 - part) * 2 * tile, 64); \
    _tile_loadd(7, b + ((2 - part) * 2 + 1) * tile, 64)
#  define MULTIPLY(step)                                   \
    _tile_dpbf16ps(0, 4, 6);                               \
    _tile_dpbf16ps(1, 4, 7);                               \
    if (!half) _tile_dpbf16ps(2, 5, 6);                    \
    if (!half) _tile_dpbf16ps(3, 5, 7);                    \
    fetch(b + block + step * tile, ahead.at, ahead.lines); \
    ahead.at += 32 * ahead.lines
  // the small ones first, in an order that loads few tiles and B's by rising address
  for (int64_t k = 0; k < count; ++k, a += block, b += block) {
    LOAD_A(0);
    LOAD_B(2);
    MULTIPLY(0);
    LOAD_B(1);
    MULTIPLY(1);
    LOAD_A(1);
    MULTIPLY(2);
    LOAD_B(0);
    MULTIPLY(3);
    LOAD_A(2);
    MULTIPLY(4);
    LOAD_A(0);
    MULTIPLY(5);
  }
#  undef LOAD_A
#  undef LOAD_B
#  undef MULTIPLY
  _tile_stored(0, C, row);
  _tile_stored(1, C + 16, row);
  if (!half) _tile_stored(2, low, row);
  if (!half) _tile_stored(3, low + 16, row);
}

}  // namespace

bool enable() {
  static const bool there = machine_has_it() && system_permits();
  is_enabled = there;
  return there;
}
bool enabled() { return is_enabled.load(std::memory_order_relaxed); }

void pack(Factor factor, bool lines_are_rows, const Rows& from, int64_t begin, int64_t end, int64_t lines,
          int64_t K, Part* to) {
  const bool transposed = lines_are_rows == (factor == Factor::b);
  auto one = [&](const Source& s, int64_t offset, int64_t t, int64_t k) {
    Part* const at = to + (t / 2 * blocks(K) + k / side) * block + t % 2 * tile;
    constexpr Factor A = Factor::a, B = Factor::b;
    if (factor == A)
      transposed ? (s.full() ? pack_tile<A, true, true> : pack_tile<A, true, false>)(s, offset, at)
                 : (s.full() ? pack_tile<A, false, true> : pack_tile<A, false, false>)(s, offset, at);
    else
      transposed ? (s.full() ? pack_tile<B, true, true> : pack_tile<B, true, false>)(s, offset, at)
                 : (s.full() ? pack_tile<B, false, true> : pack_tile<B, false, false>)(s, offset, at);
  };
  if (lines_are_rows) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t some = lines - 16 * t;
      Source s{{}, {some, some}, {}};
      for (int64_t i = 0; i < 16; ++i) {
        s.at[i] = from[std::min(16 * t + i, lines - 1)];
        s.at[16 + i] = s.at[i] + 16;
      }
      for (int64_t k = 0; k < K; k += side) {
        s.columns[0] = K - k, s.columns[1] = K - k - 16;
        one(s, k, t, k);
      }
    }
    return;
  }
  for (int64_t k = 0; k < K; k += side) {
    Source s{{}, {K - k, K - k - 16}, {}};
    for (int64_t i = 0; i < side; ++i) s.at[i] = from[std::min(k + i, K - 1)];
    for (int64_t t = begin; t < end; ++t) {
      s.columns[0] = s.columns[1] = lines - 16 * t;
      one(s, 16 * t, t, k);
    }
  }
}

Tiles::Tiles() { configure(); }
Tiles::~Tiles() { release(); }

void multiply(const Part* a, const Part* b, int64_t count, bool half, bool add, float* C, int64_t ldc,
              Ahead ahead) {
  half ? multiply<true>(a, b, count, add, C, ldc, ahead) : multiply<false>(a, b, count, add, C, ldc, ahead);
}

}  // namespace fastmaml::amx
#  if defined(__clang__)
#    pragma clang attribute pop
#  endif
#else
namespace fastmaml::amx {
bool enable() { return false; }
bool enabled() { return false; }
void pack(Factor, bool, const Rows&, int64_t, int64_t, int64_t, int64_t, Part*) {}
Tiles::Tiles() {}
Tiles::~Tiles() {}
void multiply(const Part*, const Part*, int64_t, bool, bool, float*, int64_t, Ahead) {}
}  // namespace fastmaml::amx
#endif
