// Vectors by the compiler's own extension: one source for every instruction set. A file that is compiled for
// one defines FASTMAML_ISA (its namespace) and FASTMAML_VECTOR_BYTES before it includes this.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#if defined(__x86_64__)
#  include <immintrin.h>
#endif

#pragma GCC diagnostic ignored "-Wpsabi"  // no vector passes from one file to another

// The sanitizers set it to plain `inline`: with all of it in a few functions gcc takes over ten minutes to
// instrument them.
#ifndef FASTMAML_INLINE
#  define FASTMAML_INLINE inline __attribute__((always_inline))
#endif

namespace fastmaml::FASTMAML_ISA {

template <class T>
struct VecOf {
  static constexpr int lanes = FASTMAML_VECTOR_BYTES / sizeof(T);
  using Int = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef T type __attribute__((vector_size(FASTMAML_VECTOR_BYTES)));
  typedef Int bits __attribute__((vector_size(FASTMAML_VECTOR_BYTES)));
};
template <class T>
using Vec = typename VecOf<T>::type;
template <class T>
constexpr int64_t lanes = VecOf<T>::lanes;

// Vector registers of the machine
constexpr int registers =
#if defined(__aarch64__)
    32;
#else
    FASTMAML_VECTOR_BYTES == 64 ? 32 : 16;
#endif

template <class T>
FASTMAML_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
FASTMAML_INLINE void store(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof v);
}

template <class T, int... i>
FASTMAML_INLINE Vec<T> splat(T s, std::integer_sequence<int, i...>) {
  return Vec<T>{((void)i, s)...};
}
template <class T>
FASTMAML_INLINE Vec<T> splat(T s) {
  return splat(s, std::make_integer_sequence<int, VecOf<T>::lanes>());
}

template <class T>
FASTMAML_INLINE T sum(Vec<T> v) {
  T s[lanes<T>];
  store(s, v);
  for (int64_t step = lanes<T> / 2; step > 0; step /= 2)
    for (int64_t i = 0; i < step; ++i) s[i] += s[i + step];
  return s[0];
}

// v where the lane is below n, 0 elsewhere
template <class T, class V, int... i>
FASTMAML_INLINE V first_of(V v, int64_t n, std::integer_sequence<int, i...>) {
  using Int = typename VecOf<T>::Int;
  typedef Int Lanes __attribute__((vector_size(sizeof(V))));
  return Lanes{i...} < Int(n) ? v : V{};
}
template <class T>
FASTMAML_INLINE Vec<T> first_lanes(Vec<T> v, int64_t n) {
  return first_of<T>(v, n, std::make_integer_sequence<int, VecOf<T>::lanes>());
}

// v, loaded once: gcc would read it from memory again at every use
template <class V>
FASTMAML_INLINE V in_register(V v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
  return v;
}

// f(0), .., f(N - 1) with constants: arrays indexed by them stay in registers (gcc 12 spills those of a plain
// loop).
template <int... i, class F>
FASTMAML_INLINE void unroll(std::integer_sequence<int, i...>, F&& f) {
  (f(std::integral_constant<int, i>()), ...);
}
template <int N, class F>
FASTMAML_INLINE void unroll(F&& f) {
  unroll(std::make_integer_sequence<int, N>(), f);
}
#define FASTMAML_UNROLL(i, N) unroll<N>([&](auto i) __attribute__((always_inline))

template <class V, int... i>
FASTMAML_INLINE auto join(V low, V high, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(low, high, i...);
}

// Four numbers each from all these addresses, one for each four lanes. As a plain loop it would pass through
// memory.
template <class T, int n>
FASTMAML_INLINE auto quads(const T* const* from) {
  typedef T Part __attribute__((vector_size(4 * sizeof(T))));
  if constexpr (n == 1) {
    Part part;
    __builtin_memcpy(&part, from[0], sizeof part);
    return part;
  } else {
#if FASTMAML_VECTOR_BYTES == 64
    // broadcasts under masks are loads, insertions shuffles as well
    if constexpr (n == 4 && sizeof(T) == 4) {
      __m512 v = _mm512_castps128_ps512(_mm_loadu_ps(from[0]));
      v = _mm512_mask_broadcast_f32x4(v, 0x00f0, _mm_loadu_ps(from[1]));
      v = _mm512_mask_broadcast_f32x4(v, 0x0f00, _mm_loadu_ps(from[2]));
      v = _mm512_mask_broadcast_f32x4(v, 0xf000, _mm_loadu_ps(from[3]));
      return (Vec<T>)v;
    }
#endif
#if FASTMAML_VECTOR_BYTES >= 32 && defined(__x86_64__)
    if constexpr (n == 2 && sizeof(T) == 4) {
      const __m256 low = _mm256_castps128_ps256(_mm_loadu_ps(from[0]));
      typedef T Pair __attribute__((vector_size(32)));
      return (Pair)_mm256_insertf128_ps(low, _mm_loadu_ps(from[1]), 1);
    }
#endif
    const auto low = quads<T, n / 2>(from), high = quads<T, n / 2>(from + n / 2);
    return join(low, high, std::make_integer_sequence<int, 4 * n>());
  }
}

// The first half of a vector's numbers from p on, in both halves
template <class T>
FASTMAML_INLINE Vec<T> repeat_half(const T* p) {
#if FASTMAML_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)_mm512_maskz_broadcast_f32x8(-1, _mm256_loadu_ps(p));
  else
    return (Vec<T>)_mm512_maskz_broadcast_f64x4(-1, _mm256_loadu_pd(p));
#elif FASTMAML_VECTOR_BYTES == 32 && defined(__x86_64__)
  return (Vec<T>)_mm256_broadcast_ps((const __m128*)p);
#else
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof v / 2);
  __builtin_memcpy((char*)&v + sizeof v / 2, p, sizeof v / 2);
  return v;
#endif
}

template <class V, int... i>
FASTMAML_INLINE V two_halves(V low, V high, std::integer_sequence<int, i...>) {
  constexpr int W = sizeof...(i);
  return __builtin_shufflevector(low, high, (i < W / 2 ? i : W + i)...);
}
// The low half of `low`, the high half of `high`
template <class T>
FASTMAML_INLINE Vec<T> two_halves(Vec<T> low, Vec<T> high) {
#if FASTMAML_VECTOR_BYTES == 64  // a blend; of the shuffle gcc makes an insertion
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)_mm512_mask_blend_ps(0xff00, (__m512)low, (__m512)high);
  else
    return (Vec<T>)_mm512_mask_blend_pd(0xf0, (__m512d)low, (__m512d)high);
#else
  return two_halves(low, high, std::make_integer_sequence<int, VecOf<T>::lanes>());
#endif
}

template <int half, class V, int... i>
FASTMAML_INLINE V one_half(V v, std::integer_sequence<int, i...>) {
  constexpr int W = sizeof...(i);
  return __builtin_shufflevector(v, V{}, (i < W / 2 ? i + half * (W / 2) : W + i)...);
}
// A half of v in the low lanes, 0 in the others
template <int half, class T>
FASTMAML_INLINE Vec<T> one_half(Vec<T> v) {
#if FASTMAML_VECTOR_BYTES == 64  // without a register of zeros
  const __m512 bits = (__m512)v;
  return half ? (Vec<T>)_mm512_maskz_shuffle_f32x4(0x00ff, bits, bits, 0x0e)
              : (Vec<T>)_mm512_maskz_mov_ps(0x00ff, bits);
#else
  return one_half<half>(v, std::make_integer_sequence<int, VecOf<T>::lanes>());
#endif
}

template <int from, class V, int... i>
FASTMAML_INLINE auto half_of(V v, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(v, v, (from + i)...);
}

// In each four lanes: [a0, b0, a1, b1], [a2, b2, a3, b3] (by ones), [a0, a1, b0, b1], [a2, a3, b2, b3] (by
// twos)
template <int by, int high, class V, int... i>
FASTMAML_INLINE V interleave(V a, V b, std::integer_sequence<int, i...>) {
  constexpr int W = sizeof...(i);
  return by == 1 ? __builtin_shufflevector(a, b, (i / 4 * 4 + 2 * high + i % 4 / 2 + i % 2 * W)...)
                 : __builtin_shufflevector(a, b, (i / 4 * 4 + 2 * high + i % 2 + i % 4 / 2 * W)...);
}

// The sums of each four lanes: lane 4 j + q is the sum of the four lanes of v[q] from 4 j on.
template <class T>
FASTMAML_INLINE Vec<T> sum_quads(const Vec<T> (&v)[4]) {
  constexpr auto lane = std::make_integer_sequence<int, VecOf<T>::lanes>();
  const Vec<T> low = interleave<1, 0>(v[0], v[1], lane) + interleave<1, 1>(v[0], v[1], lane);
  const Vec<T> high = interleave<1, 0>(v[2], v[3], lane) + interleave<1, 1>(v[2], v[3], lane);
  return interleave<2, 0>(low, high, lane) + interleave<2, 1>(low, high, lane);
}

template <class T, int W, class V>
FASTMAML_INLINE auto fold_quads(V v) {
  if constexpr (W == 4) {
    return v;
  } else {
    constexpr auto half = std::make_integer_sequence<int, W / 2>();
    return fold_quads<T, W / 2>(half_of<0>(v, half) + half_of<W / 2>(v, half));
  }
}

// The sums of four vectors
template <class T>
FASTMAML_INLINE auto sum4(const Vec<T> (&v)[4]) {
  if constexpr (lanes<T> < 4) {
    typedef T Quad __attribute__((vector_size(4 * sizeof(T))));
    return Quad{sum<T>(v[0]), sum<T>(v[1]), sum<T>(v[2]), sum<T>(v[3])};
  } else {
    return fold_quads<T, lanes<T>>(sum_quads<T>(v));
  }
}

// exp(x) - 1 = 2^k (exp(r) - 1) + (2^k - 1) with |r| <= ln(2) / 2: accurate near 0 too. Ends clamped, NaN
// stays NaN.
template <class T>
FASTMAML_INLINE void exp_parts(Vec<T> x, Vec<T>& scale, Vec<T>& expm1_r) {
  using V = Vec<T>;
  using Bits = typename VecOf<T>::bits;
  constexpr bool single = sizeof(T) == 4;
  constexpr T limit = single ? T(87) : T(708), magic = single ? T(12582912.0) : T(6755399441055744.0);
  constexpr T ln2_high = single ? T(0.693359375) : T(6.93145751953125e-1);
  constexpr T ln2_low = single ? T(-2.12194440e-4) : T(1.42860682030941723212e-6);
  x = x < -limit ? splat(-limit) : x;
  x = x > limit ? splat(limit) : x;
  const V shifted = x * T(1.44269504088896340736) + magic;
  const V k = shifted - magic;
  const V r = (x - k * ln2_high) - k * ln2_low;
  // the integer k lies in the low bits of `shifted`
  Bits e = (Bits)shifted - (Bits)splat(magic);
  e = (e + (single ? 127 : 1023)) << (single ? 23 : 52);
  scale = (V)e;
  constexpr int degree = single ? 7 : 13;
  constexpr double inverse_factorial[] = {1.0,
                                          1.0,
                                          1.0 / 2,
                                          1.0 / 6,
                                          1.0 / 24,
                                          1.0 / 120,
                                          1.0 / 720,
                                          1.0 / 5040,
                                          1.0 / 40320,
                                          1.0 / 362880,
                                          1.0 / 3628800,
                                          1.0 / 39916800,
                                          1.0 / 479001600,
                                          1.0 / 6227020800};
  V p = splat(T(inverse_factorial[degree]));
  FASTMAML_UNROLL(i, degree - 1) { p = p * r + T(inverse_factorial[degree - 1 - i]); });
  expm1_r = p * r;
}

template <class T>
FASTMAML_INLINE Vec<T> exp(Vec<T> x) {
  Vec<T> scale, p;
  exp_parts<T>(x, scale, p);
  return scale * p + scale;
}

template <class T>
FASTMAML_INLINE Vec<T> expm1(Vec<T> x) {
  Vec<T> scale, p;
  exp_parts<T>(x, scale, p);
  return scale * p + (scale - T(1));
}

template <class T>
FASTMAML_INLINE Vec<T> tanh(Vec<T> x) {
  const Vec<T> limit = splat(T(20));
  x = x > limit ? limit : x;
  x = x < -limit ? -limit : x;
  const Vec<T> e = expm1<T>(x + x);
  return e / (e + T(2));
}

template <class T>
FASTMAML_INLINE Vec<T> sigmoid(Vec<T> x) {
  return T(1) / (T(1) + exp<T>(-x));
}

template <class T>
FASTMAML_INLINE Vec<T> sqrt(Vec<T> x) {
  FASTMAML_UNROLL(i, (int)lanes<T>) { x[(int)i] = std::sqrt(x[(int)i]); });
  return x;
}

template <class T>
FASTMAML_INLINE Vec<T> erf(Vec<T> x) {
  FASTMAML_UNROLL(i, (int)lanes<T>) { x[(int)i] = std::erf(x[(int)i]); });
  return x;
}

// x, or slope * x below zero
template <class T>
FASTMAML_INLINE Vec<T> leaky_relu(Vec<T> x, T slope) {
  return x < T(0) ? x * slope : x;
}

// d times the slope of leaky_relu where its input (or, the slope not being negative, its output) is y
template <class T>
FASTMAML_INLINE Vec<T> leaky_relu_grad(Vec<T> d, Vec<T> y, T slope) {
  return y > T(0) ? d : d * slope;
}

}  // namespace fastmaml::FASTMAML_ISA
