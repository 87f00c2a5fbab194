// The engine for AVX2 with FMA. What it shares with other files is included first, so that only its own
// namespace is compiled for this instruction set.
#if defined(__x86_64__)
#  include <immintrin.h>

#  include <algorithm>
#  include <cmath>
#  include <cstring>
#  include <limits>
#  include <memory>
#  include <optional>
#  include <utility>

#  include "amx.h"
#  include "arena.h"
#  include "parallel.h"
#  include "request.h"

#  if defined(__clang__)
#    pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#  else
#    pragma GCC target("avx2,fma")
#  endif
#  define FASTMAML_ISA avx2
#  define FASTMAML_VECTOR_BYTES 32
#  include "inner_loop.h"

namespace fastmaml {
void run_avx2(const Request& request) { avx2::run_request(request); }
}  // namespace fastmaml
#  if defined(__clang__)
#    pragma clang attribute pop
#  endif
#endif
