// What Python calls, by ctypes: the same functions from nvcc's library and from the emulation's. Each returns
// 0 or an error's number, whose text fastmaml_cuda_error has.
#pragma once
#include <cstring>

#include "plan.h"
#include "run.h"

#define FASTMAML_ENTRY extern "C" __attribute__((visibility("default")))

FASTMAML_ENTRY int64_t fastmaml_cuda_table_size() { return sizeof(fastmaml::cuda::Table); }

// Lays the program out. `why`: up to 255 characters on why it cannot be, if the result is not 0.
FASTMAML_ENTRY int fastmaml_cuda_plan(const char* program, const fastmaml::cuda::Sizes* sizes,
                                      fastmaml::cuda::Table* table, int64_t* bytes, int64_t* set, char* why) {
  try {
    fastmaml::cuda::Planner(fastmaml::decode(program), *sizes, *table).plan();
    *bytes = int64_t(table->numbers) * sizes->itemsize;
    *set = table->P;
    return 0;
  } catch (const std::exception& error) {
    std::strncpy(why, error.what(), 255);
    why[255] = 0;
    return -1;
  }
}

FASTMAML_ENTRY int fastmaml_cuda_run(const fastmaml::cuda::Table* table, const fastmaml::cuda::Call* call,
                                     const fastmaml::cuda::Sums* sums, int itemsize, int precision,
                                     int device, void* stream) {
  using namespace fastmaml::cuda;
  if (const int error = use(device)) return error;
  const auto runs = itemsize == 8       ? run<double, ieee>
                    : precision == ieee ? run<float, ieee>
                    : precision == tf32 ? run<float, tf32>
                                        : run<float, bf16>;
  return runs(*table, *call, *sums, stream);
}

FASTMAML_ENTRY const char* fastmaml_cuda_error(int error) { return fastmaml::cuda::error_text(error); }
FASTMAML_ENTRY int fastmaml_cuda_shared_limit(int device) { return fastmaml::cuda::shared_limit(device); }
FASTMAML_ENTRY int fastmaml_cuda_has_code(int device) {
  using namespace fastmaml::cuda;
  if (const int error = use(device)) return error;
  return has_code(inner_loop_kernel<float, ieee>);
}
FASTMAML_ENTRY int fastmaml_cuda_devices() { return fastmaml::cuda::devices(); }
