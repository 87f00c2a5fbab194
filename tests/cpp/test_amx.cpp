// Products on the matrix unit, as factored layers have them, against sums in double: not twice as far off as
// those of float32, every row the same in any block, and no finite number where a factor has none.
#if defined(__x86_64__)
#  include <immintrin.h>

#  include <algorithm>
#  include <cmath>
#  include <cstdio>
#  include <cstdlib>
#  include <cstring>
#  include <functional>
#  include <limits>
#  include <random>
#  include <string>
#  include <vector>

#  include "cpu/amx.h"
#  include "cpu/arena.h"
#  include "cpu/plan.h"
#  include "threads.h"  // which `make sanitize`, linking the whole engine, asks for

std::mt19937 generator;
std::string now;  // what is being tested

void check_products();

// Before it is known what the machine has.
int main() {
  if (!fastmaml::amx::enable()) {
    std::printf("skipped: this machine or system has no AMX\n");
    return 0;
  }
  check_products();
  std::printf("every product right\n");
}

#  if defined(__clang__)
#    pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512dq,avx512vl"))), \
                                 apply_to = function)
#  else
#    pragma GCC target("avx2,fma,avx512f,avx512dq,avx512vl,prefer-vector-width=512")
#  endif
#  define FASTMAML_ISA avx512
#  define FASTMAML_VECTOR_BYTES 64
#  include "cpu/outer_products.h"
#  include "cpu/packed.h"

namespace {

using namespace fastmaml;
using avx512::Activate;
using avx512::Packed;
using Products = avx512::OuterProducts<float>;

void check(bool right, const std::string& what, double got, double wanted) {
  if (right) return;
  std::printf("%s: %s: %.9g, against %.9g\n", now.c_str(), what.c_str(), got, wanted);
  std::exit(EXIT_FAILURE);
}

float normal() { return std::normal_distribution<float>()(generator); }
float of_any_size() { return std::ldexp(normal(), static_cast<int>(generator() % 61) - 30); }
float positive() { return 1 + static_cast<float>(generator() % 4096) / 4096; }

// Rows of `columns` numbers, and NaN between them.
struct Matrix {
  int64_t rows, columns, ld;
  std::vector<float> data;

  Matrix(int64_t rows, int64_t columns, const std::function<float()>& number, int64_t padding = 0)
      : rows(rows), columns(columns), ld(round_up(columns, 16) + padding), data(rows * ld, std::nanf("")) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < columns; ++c) (*this)(r, c) = number();
  }
  float& operator()(int64_t r, int64_t c) { return data[r * ld + c]; }
  float operator()(int64_t r, int64_t c) const { return data[r * ld + c]; }
};

// a b for a [M, K] and b [K, N], or [N, K] if it is transposed
Matrix times(const Matrix& a, const Matrix& b, bool transposed, const Matrix& start,
             const Activate<float>& e = {}) {
  const int64_t K = a.columns, N = transposed ? b.rows : b.columns;
  const Arena memory(Packed<float>::size(true, K, N) * sizeof(float));
  const Packed<float> packed{K, N, true, static_cast<float*>(memory.data())};
  avx512::column_panels<float>(N, [&](auto vectors, int64_t c) {
    packed.fill(c, vectors * 16, b.data.data(), transposed ? 1 : b.ld, transposed ? b.ld : 1);
  });
  Matrix c = start;
  packed.times(a.rows, a.data.data(), a.ld, c.data.data(), c.ld, e);
  return c;
}

struct Error {
  double ours = 0, theirs = 0, largest = 0;  // root mean squares of the errors, the largest sum
};

// f(m, n, k): the k-th factors of the sum C[m, n]. Theirs: added up one by one, each rounded once.
template <class F>
Error compare(const Matrix& C, int64_t K, const F& factors) {
  Error e;
  for (int64_t m = 0; m < C.rows; ++m)
    for (int64_t n = 0; n < C.columns; ++n) {
      double exact = 0;
      float sum = 0;
      for (int64_t k = 0; k < K; ++k) {
        const auto [a, b] = factors(m, n, k);
        exact += double(a) * double(b), sum = std::fma(a, b, sum);
      }
      e.ours += std::pow(C(m, n) - exact, 2), e.theirs += std::pow(sum - exact, 2);
      e.largest = std::max(e.largest, std::abs(exact));
    }
  const double count = C.rows * C.columns;
  e.ours = std::sqrt(e.ours / count), e.theirs = std::sqrt(e.theirs / count);
  return e;
}

void check_error(const Error& e, const std::string& what) {
  std::printf("%-38s %-22s error %.2e, float32's own %.2e, of %.2e\n", now.c_str(), what.c_str(), e.ours,
              e.theirs, e.largest);
  check(e.ours <= 2 * e.theirs, what, e.ours, e.theirs);
}

const struct {
  const char* name;
  float (*number)();
} kinds[] = {{"normal", normal}, {"of any size", of_any_size}, {"positive", positive}};

void check_times(int64_t M, int64_t K, int64_t N) {
  now = std::to_string(M) + " x " + std::to_string(K) + " x " + std::to_string(N);
  for (const auto& kind : kinds)
    for (bool transposed : {false, true}) {
      const Matrix a(M, K, kind.number, 16);
      const Matrix b(transposed ? N : K, transposed ? K : N, kind.number);
      const Matrix zeros(M, N, [] { return 0.0f; });
      const Matrix c = times(a, b, transposed, zeros);
      check_error(compare(c, K,
                          [&](int64_t m, int64_t n, int64_t k) {
                            return std::pair(a(m, k), transposed ? b(n, k) : b(k, n));
                          }),
                  kind.name + std::string(transposed ? ", by columns" : ""));
      for (int64_t m = 0; m < M; m += 37) {  // alone, and in another place of its block
        Matrix row(
            std::min<int64_t>(2, M - m), K, [] { return 0.0f; }, 16);
        std::copy_n(a.data.begin() + m * a.ld, row.data.size(), row.data.begin());
        const Matrix alone = times(row, b, transposed, Matrix(row.rows, N, [] { return 0.0f; }));
        for (int64_t r = 0; r < row.rows; ++r)
          for (int64_t n = 0; n < N; ++n)
            check(alone(r, n) == c(m + r, n), "row " + std::to_string(m) + " alone", alone(r, n),
                  c(m + r, n));
      }
    }
}

// Nearly all of a sum cancels.
void check_cancellation() {
  now = "cancellation";
  Matrix a(40, 64, normal);
  Matrix b(64, 70, normal);
  for (int64_t k = 0; k < 64; k += 2) {
    for (int64_t m = 0; m < a.rows; ++m) a(m, k + 1) = a(m, k);
    for (int64_t n = 0; n < b.columns; ++n) b(k + 1, n) = -b(k, n) * (1 + 0x1p-12f);
  }
  const Matrix c = times(a, b, false, Matrix(40, 70, [] { return 0.0f; }));
  check_error(compare(c, 64, [&](int64_t m, int64_t n, int64_t k) { return std::pair(a(m, k), b(k, n)); }),
              "normal");
}

// What happens to a product after the sum, where the sum is made in pieces.
void check_ends(int64_t K) {
  now = "ends, K " + std::to_string(K);
  const int64_t M = 45, N = 75;
  const Matrix a(M, K, normal), b(K, N, normal), start(M, N, normal), mask(M, N, normal);
  for (int kind = 0; kind < 4; ++kind) {
    Activate<float> e;
    e.add = kind > 0, e.act = kind == 2, e.slope = 0.1f;
    if (kind == 3) e.mask = mask.data.data(), e.ld_mask = mask.ld, e.mask_slope = 0.2f;
    const Matrix c = times(a, b, false, start, e);
    for (int64_t m = 0; m < M; ++m)
      for (int64_t n = 0; n < N; ++n) {
        double wanted = e.add ? start(m, n) : 0;
        for (int64_t k = 0; k < K; ++k) wanted += double(a(m, k)) * double(b(k, n));
        if (e.act && wanted < 0) wanted *= e.slope;
        if (e.mask && mask(m, n) <= 0) wanted *= e.mask_slope;
        check(std::abs(c(m, n) - wanted) < 1e-6 * K, "end " + std::to_string(kind), c(m, n), wanted);
      }
  }
}

void check_special_numbers() {
  const int64_t M = 40, K = 70, N = 80;
  const float inf = std::numeric_limits<float>::infinity(), nan = std::nanf("");
  const Matrix zeros(M, N, [] { return 0.0f; });
  // bits that rounding would carry into the sign, and signs
  const float low_bits = [] {
    const uint32_t bits = 0x7fffffff;
    float f;
    std::memcpy(&f, &bits, sizeof f);
    return f;
  }();
  for (float bad : {nan, -nan, low_bits, inf, -inf, std::numeric_limits<float>::max()}) {
    now = "a number " + std::to_string(bad);
    for (bool in_a : {true, false}) {
      Matrix a(M, K, normal), b(K, N, normal);
      in_a ? a(33, 69) = bad : b(69, 65) = bad;
      const Matrix c = times(a, b, false, zeros);
      for (int64_t m = 0; m < M; ++m)
        for (int64_t n = 0; n < N; ++n) {
          const bool touched = in_a ? m == 33 : n == 65;
          check(std::isfinite(c(m, n)) != touched, "is finite", c(m, n), bad);
          check(!touched || !std::isnan(bad) || std::isnan(c(m, n)), "is NaN", c(m, n), bad);
        }
    }
  }
  for (float size : {1e38f, 1e30f, 1e-20f, 1e-30f, 1e-36f, 1e-38f, 1e-40f}) {
    now = "numbers of some " + std::to_string(std::log10(size));
    const Matrix a(M, K, [&] { return size * std::min(std::abs(normal()), 3.0f); });
    const Matrix b(K, N, [&] { return std::min(1.0f, 1 / (128 * size)) * normal(); });
    const Matrix c = times(a, b, false, zeros);
    for (int64_t m = 0; m < M; ++m)
      for (int64_t n = 0; n < N; ++n) {
        double wanted = 0, all = 0, lost = 0;
        for (int64_t k = 0; k < K; ++k) {
          const double product = double(a(m, k)) * double(b(k, n));
          wanted += product, all += std::abs(product);
          lost += 0x1p-126 * (6 + std::abs(a(m, k)) + std::abs(b(k, n)));
        }
        check(std::abs(c(m, n) - wanted) <= 0x1p-22 * all + lost, "value", c(m, n), wanted);
      }
  }
}

// d^T x from pieces of rows, in blocks, added to what is there
void check_outer_products(int64_t O, int64_t I, std::vector<int64_t> pieces) {
  int64_t all = 0;
  for (int64_t n : pieces) all += n;
  now = "outer products " + std::to_string(all) + " rows, " + std::to_string(O) + " x " + std::to_string(I);
  for (const auto& kind : kinds)
    for (bool add : {false, true}) {
      const Matrix d(all, O, kind.number), x(all, I, kind.number);
      Products products(all, O, I);
      check(products.on_amx, "on the unit", products.on_amx, 1);
      int64_t r = 0;
      for (int64_t n : pieces) {
        products.add(d.data.data() + r * d.ld, d.ld, x.data.data() + r * x.ld, x.ld, n);
        r += n;
        if (n % 2) products.close();
      }
      products.close();
      std::vector<float> out(O * I, add ? 0.5f : std::nanf(""));
      const Arena scratch(Products::scratch_size() * sizeof(float));
      float* const memory = static_cast<float*>(scratch.data());
      for (int64_t o = 0; o < O; o += products.rows)
        for (int64_t i = 0; i < I; i += products.columns) {
          std::fill_n(memory, Products::scratch_size(), std::nanf(""));
          products.write(o, std::min(products.rows, O - o), i, std::min(products.columns, I - i), out.data(),
                         add, memory);
        }
      Matrix c(O, I, [] { return 0.0f; });
      for (int64_t o = 0; o < O; ++o)
        for (int64_t i = 0; i < I; ++i) c(o, i) = -out[o * I + i];
      check_error(compare(c, all + 1,
                          [&](int64_t o, int64_t i, int64_t k) {
                            return k == 0 ? std::pair(add ? -0.5f : 0.0f, 1.0f)
                                          : std::pair(d(k - 1, o), x(k - 1, i));
                          }),
                  kind.name + std::string(add ? ", added" : ""));
    }
}

}  // namespace

void check_products() {
  check_times(33, 32, 64);
  check_times(45, 40, 75);
  check_times(150, 100, 96);
  check_times(17, 33, 81);
  check_times(48, 1100, 70);
  check_cancellation();
  for (int64_t K : {40, 1100, 2080}) check_ends(K);
  check_special_numbers();
  check_outer_products(70, 90, {32});
  check_outer_products(300, 600, {5, 80, 1, 140, 34});
}
#  if defined(__clang__)
#    pragma clang attribute pop
#  endif
#else
#  include <cstdio>
int main() { std::printf("skipped: this machine has no AMX\n"); }
#endif
