// Chooses the instruction set at run time.
#include <cstdlib>
#include <stdexcept>

#include "amx.h"
#include "request.h"

namespace fastmaml {

void run_generic(const Request&);
void run_avx2(const Request&);
void run_avx512(const Request&);

std::string isa() {
  static const std::string name = [] {
    const char* const wanted = std::getenv("FASTMAML_ISA");
    const std::string most = wanted && *wanted ? wanted : "amx";
    if (most != "generic" && most != "avx2" && most != "avx512" && most != "amx")
      throw std::invalid_argument("FASTMAML_ISA must be generic, avx2, avx512 or amx, got " + most);
#if defined(__x86_64__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
    const bool wide = avx2 && avx512 && (most == "avx512" || most == "amx");
    if (wide && most == "amx" && amx::enable()) return "amx";
    if (wide) return "avx512";
    if (most != "generic" && avx2) return "avx2";
#endif
    return "generic";
  }();
  return name;
}

void run(const Request& request) {
#if defined(__x86_64__)
  if (isa() == "avx512" || isa() == "amx") return run_avx512(request);  // which multiplies on it
  if (isa() == "avx2") return run_avx2(request);
#endif
  run_generic(request);
}

}  // namespace fastmaml
