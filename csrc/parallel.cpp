// The engine's work on torch's own threads. A pool beside them would share the cores with them: after each of
// torch's parallel ops they spin for milliseconds, in case there is another (measured, 2 cores: a meta-step
// of 19 ms took 23 on threads of its own when it followed an op of torch's, 20 on torch's).
#include "cpu/parallel.h"

#include <torch/csrc/stable/ops.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <exception>

namespace fastmaml {

static const pid_t loaded_in = getpid();

void parallel(int64_t items, int threads, const std::function<void(int64_t, int)>& f) {
  threads = static_cast<int>(std::min<int64_t>(threads, items));
  // a forked child has OpenMP's memory but not its threads, and would wait for them forever
  if (threads <= 1 || getpid() != loaded_in) {
    for (int64_t i = 0; i < items; ++i) f(i, 0);
    return;
  }
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error;  // of the first that failed: on its way through torch it would lose its type
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    try {
      for (int64_t worker = begin; worker < end; ++worker)
        for (int64_t i; !failed && (i = next.fetch_add(1, std::memory_order_relaxed)) < items;)
          f(i, static_cast<int>(worker));
    } catch (...) {
      if (!failed.exchange(true)) error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

}  // namespace fastmaml
