#include "thread_pool.h"

#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace fastmaml {
namespace {

// long enough for what a training step does between two calls
constexpr auto kSpin = std::chrono::microseconds(500);

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

class Pool {
 public:
  explicit Pool(int workers) {
    for (int i = 1; i <= workers; ++i) threads_.emplace_back([this, i] { work(i); });
  }

  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
      ++round_;
    }
    wake_.notify_all();
    for (std::thread& t : threads_) t.join();
  }

  int workers() const { return static_cast<int>(threads_.size()); }

  void run(int64_t items, int threads, const std::function<void(int64_t, int)>& f) {
    f_ = &f, items_ = items, threads_wanted_ = threads;
    next_.store(0, std::memory_order_relaxed);
    busy_.store(workers(), std::memory_order_relaxed);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      round_.fetch_add(1, std::memory_order_release);
    }
    if (asleep_.load() > 0) wake_.notify_all();
    share(0);
    for (int spins = 0; busy_.load(std::memory_order_acquire) > 0; ++spins)
      if (spins < 10000)
        pause();
      else
        std::this_thread::yield();
  }

 private:
  void share(int worker) {
    if (worker >= threads_wanted_) return;
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < items_;) (*f_)(i, worker);
  }

  void work(int worker) {
    uint64_t seen = 0;
    while (true) {
      const auto until = std::chrono::steady_clock::now() + kSpin;
      int spins = 0;
      while (round_.load(std::memory_order_acquire) == seen) {
        pause();
        if (++spins % 64 == 0 && std::chrono::steady_clock::now() > until) {
          std::unique_lock<std::mutex> lock(mutex_);
          asleep_.fetch_add(1);
          wake_.wait(lock, [&] { return round_.load(std::memory_order_acquire) != seen; });
          asleep_.fetch_sub(1);
        }
      }
      seen = round_.load(std::memory_order_acquire);
      if (stop_) return;
      share(worker);
      busy_.fetch_sub(1, std::memory_order_release);
    }
  }

  std::vector<std::thread> threads_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<uint64_t> round_{0};
  std::atomic<int> asleep_{0}, busy_{0};
  std::atomic<int64_t> next_{0};
  int64_t items_ = 0;
  int threads_wanted_ = 0;
  const std::function<void(int64_t, int)>* f_ = nullptr;
  bool stop_ = false;
};

std::mutex pool_mutex;  // one call at a time has the pool; others run alone
std::unique_ptr<Pool> pool;
pid_t pool_pid = 0;

}  // namespace

void parallel(int64_t items, int threads, const std::function<void(int64_t, int)>& f) {
  if (threads > items) threads = static_cast<int>(items);
  std::unique_lock<std::mutex> lock(pool_mutex, std::try_to_lock);
  if (threads <= 1 || !lock.owns_lock()) {
    for (int64_t i = 0; i < items; ++i) f(i, 0);
    return;
  }
  if (pool_pid != getpid()) {  // a fork has the memory but not the threads
    (void)pool.release();
    pool_pid = getpid();
  }
  if (!pool || pool->workers() < threads - 1) {
    pool.reset();
    pool = std::make_unique<Pool>(threads - 1);
  }
  pool->run(items, threads, f);
}

}  // namespace fastmaml
