// The thread pool: every item once, whatever the numbers of threads, of callers and of calls before.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <thread>
#include <vector>

#include "cpu/thread_pool.h"

namespace {

void check_call(int64_t items, int threads) {
  // plain numbers: TSan sees a race if two workers share an item, or if the caller does not wait for one
  std::vector<int> times(items);
  std::vector<int64_t> items_of(threads);
  fastmaml::parallel(items, threads, [&](int64_t item, int worker) {
    ++times[item];
    ++items_of.at(worker);
  });
  int64_t total = 0;
  for (int64_t n : items_of) total += n;
  for (int n : times)
    if (n != 1 || total != items) {
      std::printf("%d threads: an item was done %d times, %ld of %ld items\n", threads, n, long(total),
                  long(items));
      std::exit(EXIT_FAILURE);
    }
}

void check_calls() {
  for (int round = 0; round < 20; ++round)
    for (int64_t items : {0, 1, 2, 3, 100})
      for (int threads : {1, 2, 4, 3}) check_call(items, threads);
}

}  // namespace

int main() {
  check_calls();
  for (int i = 0; i < 5; ++i) {  // workers that have gone to sleep
    std::this_thread::sleep_for(std::chrono::milliseconds(3));
    check_call(50, 3);
  }
  std::thread other(check_calls);
  check_calls();
  other.join();
  std::printf("every item was done once\n");
}
