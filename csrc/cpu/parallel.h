// The threads of a call. The engine knows no torch: csrc/parallel.cpp has torch's, the C++ tests their own.
#pragma once
#include <cstdint>
#include <functional>

namespace fastmaml {

// f(item, worker) for every item in [0, items), workers in [0, threads). Items are handed out one by one, so
// f may depend on the worker for scratch memory only.
void parallel(int64_t items, int threads, const std::function<void(int64_t, int)>& f);

}  // namespace fastmaml
