// What Python calls, by ctypes: the same functions from nvcc's library and from the emulation's. Each returns
// 0 or an error's number, whose text fastmaml_cuda_error has.
#pragma once
#include <cstring>

#include "plan.h"
#include "task.cuh"

#define FASTMAML_ENTRY extern "C" __attribute__((visibility("default")))

namespace fastmaml::cuda {

template <class T>
int run(const Table& table, const Call& call, const Sums& sums, void* stream) {
  int error = launch(inner_loop_kernel<T>, unsigned(call.T), unsigned(table.threads),
                     table.numbers * int(sizeof(T)), stream, table, call);
  int64_t size = 0;
  for (int i = 0; i < sums.count; ++i) size += sums.of[i].size;
  if (!error && size > 0)
    error = launch(sum_tasks_kernel<T>, unsigned((size + 255) / 256), 256u, 0, stream, sums);
  return error;
}

}  // namespace fastmaml::cuda

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
                                     const fastmaml::cuda::Sums* sums, int itemsize, void* stream) {
  using namespace fastmaml::cuda;
  return itemsize == 8 ? run<double>(*table, *call, *sums, stream) : run<float>(*table, *call, *sums, stream);
}

FASTMAML_ENTRY const char* fastmaml_cuda_error(int error) { return fastmaml::cuda::error_text(error); }
FASTMAML_ENTRY int fastmaml_cuda_shared_limit(int device) { return fastmaml::cuda::shared_limit(device); }
FASTMAML_ENTRY int fastmaml_cuda_devices() { return fastmaml::cuda::devices(); }
