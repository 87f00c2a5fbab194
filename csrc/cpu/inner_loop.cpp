// Chooses the instruction set at run time.
#include <cstdlib>

#include "request.h"

namespace fastmaml {

void run_generic(const Request&);
void run_avx2(const Request&);

std::string isa() {
  static const std::string name = [] {
    const char* wanted = std::getenv("FASTMAML_ISA");
    if (wanted && std::string(wanted) == "generic") return "generic";
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return "avx2";
#endif
    return "generic";
  }();
  return name;
}

void run(const Request& request) {
#if defined(__x86_64__)
  if (isa() == "avx2") return run_avx2(request);
#endif
  run_generic(request);
}

}  // namespace fastmaml
