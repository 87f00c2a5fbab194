// The engine for any machine: 16-byte vectors, which every 64-bit one has.
#define FASTMAML_ISA generic
#define FASTMAML_VECTOR_BYTES 16
#include "inner_loop.h"

namespace fastmaml {
void run_generic(const Request& request) { generic::run_request(request); }
}  // namespace fastmaml
