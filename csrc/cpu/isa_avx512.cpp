// The engine for AVX-512. What it shares with other files is included first, so that only its own namespace
// is compiled for this instruction set.
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
#    pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512dq,avx512vl"))), \
                                 apply_to = function)
#  else
#    pragma GCC target("avx2,fma,avx512f,avx512dq,avx512vl,prefer-vector-width=512")
#  endif
#  define FASTMAML_ISA avx512
#  define FASTMAML_VECTOR_BYTES 64
#  include "inner_loop.h"

namespace fastmaml {
void run_avx512(const Request& request) { avx512::run_request(request); }
}  // namespace fastmaml
#  if defined(__clang__)
#    pragma clang attribute pop
#  endif
#endif
