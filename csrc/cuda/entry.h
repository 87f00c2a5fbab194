// What Python calls, by ctypes: the same functions from nvcc's library and from the emulation's. Each returns
// 0 or an error's number, whose text fastmaml_cuda_error has.
#pragma once
#include <cstring>

#include "plan.h"

// in run.h, compiled for each
namespace fastmaml::cuda {
namespace one_block {
int run(const Table& table, const Call& call, const Sums& sums, int itemsize, void* stream);
int why_absent();
}  // namespace one_block
namespace cluster {
int run(const Table& table, const Call& call, const Sums& sums, int itemsize, void* stream);
int why_absent();
}  // namespace cluster
}  // namespace fastmaml::cuda

#define FASTMAML_ENTRY extern "C" __attribute__((visibility("default")))

FASTMAML_ENTRY int64_t fastmaml_cuda_table_size() { return sizeof(fastmaml::cuda::Table); }

// Lays the program out. found: the bytes of shared memory that a task needs, the numbers of a set of weights,
// the blocks that share a task, and the threads of each. why: up to 255 characters on why it cannot be, if
// the result is not 0.
FASTMAML_ENTRY int fastmaml_cuda_plan(const char* program, const fastmaml::cuda::Sizes* sizes,
                                      fastmaml::cuda::Table* table, int64_t* found, char* why) {
  try {
    fastmaml::cuda::Planner(fastmaml::decode(program), *sizes, *table).plan();
    found[0] = int64_t(table->numbers) * sizes->itemsize;
    found[1] = table->P;
    found[2] = table->blocks;
    found[3] = table->threads;
    return 0;
  } catch (const std::exception& error) {
    std::strncpy(why, error.what(), 255);
    why[255] = 0;
    return -1;
  }
}

FASTMAML_ENTRY int fastmaml_cuda_run(const fastmaml::cuda::Table* table, const fastmaml::cuda::Call* call,
                                     const fastmaml::cuda::Sums* sums, int itemsize, int device,
                                     void* stream) {
  using namespace fastmaml::cuda;
  if (const int error = use(device)) return error;
  const auto run = table->blocks == 1 ? one_block::run : cluster::run;
  return run(*table, *call, *sums, itemsize, stream);
}

FASTMAML_ENTRY const char* fastmaml_cuda_error(int error) { return fastmaml::cuda::error_text(error); }
FASTMAML_ENTRY int fastmaml_cuda_shared_limit(int device) { return fastmaml::cuda::shared_limit(device); }
FASTMAML_ENTRY int fastmaml_cuda_has_code(int device) {
  using namespace fastmaml::cuda;
  if (const int error = use(device)) return error;
  return one_block::why_absent();
}
// that can share a task
FASTMAML_ENTRY int fastmaml_cuda_blocks(int device) {
  using namespace fastmaml::cuda;
  return has_clusters(device) && !use(device) && !cluster::why_absent() ? 8 : 1;
}
FASTMAML_ENTRY int fastmaml_cuda_devices() { return fastmaml::cuda::devices(); }
