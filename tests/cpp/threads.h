// Threads for the engine where there is no torch.
#pragma once
#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#include "cpu/parallel.h"

namespace fastmaml {

void parallel(int64_t items, int threads, const std::function<void(int64_t, int)>& f) {
  std::atomic<int64_t> next{0};
  auto work = [&](int worker) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < items;) f(i, worker);
  };
  std::vector<std::thread> others;
  for (int worker = 1; worker < std::min<int64_t>(threads, items); ++worker)
    others.emplace_back(work, worker);
  work(0);
  for (std::thread& other : others) other.join();
}

}  // namespace fastmaml
