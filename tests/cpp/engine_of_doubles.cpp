// The engine as csrc/cpu/isa_generic.cpp has it, for double alone: it compiles in half the time.
#define FASTMAML_ISA generic
#define FASTMAML_VECTOR_BYTES 16
#include "cpu/inner_loop.h"

namespace fastmaml {
void run_generic(const Request& request) { generic::Run<double>{request}.run(); }
}  // namespace fastmaml
