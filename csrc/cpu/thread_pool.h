// Workers that wait for the next call by spinning for a moment, then sleep: a meta-step is shorter than
// waking a thread.
#pragma once
#include <cstdint>
#include <functional>

namespace fastmaml {

// f(item, worker) for every item in [0, items), workers in [0, threads); the caller is worker 0. Items are
// handed out one by one, so f may depend on the worker for scratch memory only.
void parallel(int64_t items, int threads, const std::function<void(int64_t, int)>& f);

}  // namespace fastmaml
