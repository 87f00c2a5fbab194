// A call (host code).
#pragma once
#include "task.cuh"

namespace fastmaml::cuda::FASTMAML_TEAM {

template <class T>
int run(const Table& table, const Call& call, const Sums& sums, void* stream) {
  const Team team{unsigned(table.blocks), unsigned(table.threads), table.block_numbers * int(sizeof(T))};
  return launch(inner_loop_kernel<T>, unsigned(call.T), team, stream, table, call, sums);
}

int run(const Table& table, const Call& call, const Sums& sums, int itemsize, void* stream) {
  return itemsize == 8 ? run<double>(table, call, sums, stream) : run<float>(table, call, sums, stream);
}

// 0, or an error if this binary has no code for the current device
int why_absent() { return has_code(inner_loop_kernel<float>, FASTMAML_CLUSTER ? 90 : 80); }

}  // namespace fastmaml::cuda::FASTMAML_TEAM
