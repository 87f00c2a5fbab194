// A call: the inner loop, and the sums over tasks (host code).
#pragma once
#include "task.cuh"

namespace fastmaml::cuda {

template <class T, Precision P>
int run(const Table& table, const Call& call, const Sums& sums, void* stream) {
  int error = launch(inner_loop_kernel<T, P>, unsigned(call.T), unsigned(table.threads),
                     table.numbers * int(sizeof(T)), stream, table, call);
  int64_t size = 0;
  for (int i = 0; i < sums.count; ++i) size += sums.of[i].size;
  if (!error && size > 0)
    error = launch(sum_tasks_kernel<T>, unsigned((size + 255) / 256), 256u, 0, stream, sums);
  return error;
}

}  // namespace fastmaml::cuda
