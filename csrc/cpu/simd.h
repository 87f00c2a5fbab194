// Vectors by the compiler's own extension: one source for every instruction set. A file that is compiled for
// one defines FASTMAML_ISA (its namespace) and FASTMAML_VECTOR_BYTES before it includes this.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

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

// The four sums of four vectors: two rounds of pairwise adds, then the 4-wide pieces.
template <class T>
FASTMAML_INLINE auto sum4(Vec<T> a, Vec<T> b, Vec<T> c, Vec<T> d) {
  constexpr int W = VecOf<T>::lanes;
  typedef T Quad __attribute__((vector_size(4 * sizeof(T))));
  if constexpr (W == 8) {
    const Vec<T> ab = __builtin_shufflevector(a, b, 0, 8, 1, 9, 4, 12, 5, 13) +
                      __builtin_shufflevector(a, b, 2, 10, 3, 11, 6, 14, 7, 15);
    const Vec<T> cd = __builtin_shufflevector(c, d, 0, 8, 1, 9, 4, 12, 5, 13) +
                      __builtin_shufflevector(c, d, 2, 10, 3, 11, 6, 14, 7, 15);
    const Vec<T> s = __builtin_shufflevector(ab, cd, 0, 1, 8, 9, 4, 5, 12, 13) +
                     __builtin_shufflevector(ab, cd, 2, 3, 10, 11, 6, 7, 14, 15);
    return __builtin_shufflevector(s, s, 0, 1, 2, 3) + __builtin_shufflevector(s, s, 4, 5, 6, 7);
  } else if constexpr (W == 4) {
    const Vec<T> ab = __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7);
    const Vec<T> cd = __builtin_shufflevector(c, d, 0, 4, 1, 5) + __builtin_shufflevector(c, d, 2, 6, 3, 7);
    return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
  } else {
    return Quad{sum<T>(a), sum<T>(b), sum<T>(c), sum<T>(d)};
  }
}

// v where the lane is below n, 0 elsewhere
template <class T>
FASTMAML_INLINE Vec<T> first_lanes(Vec<T> v, int64_t n) {
  typename VecOf<T>::bits lane;
  for (int i = 0; i < lanes<T>; ++i) lane[i] = i;
  return lane < (typename VecOf<T>::Int)n ? v : Vec<T>{};
}

// v, loaded once: gcc would read it from memory again at every use
template <class V>
FASTMAML_INLINE V in_register(V v) {
#if defined(__x86_64__)
  asm("" : "+x"(v));
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
