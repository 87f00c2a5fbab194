// Runs the kernels' source on the host, for tests: every thread of two teams as a fiber of one thread of the
// machine, switched at barriers and shuffles; or, with FASTMAML_EMULATE_THREADS, as a thread of its own, for
// ThreadSanitizer.
//
// What it finds besides wrong values: threads that wait at different barriers or leave one out; what is read
// of shared memory before it is written (it starts as NaN); under sanitizers, accesses out of bounds,
// misaligned ones, and races within a team.
#pragma once
#include <math.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#ifdef FASTMAML_EMULATE_THREADS
#  include <linux/futex.h>
#  include <pthread.h>
#  include <sys/syscall.h>
#  include <unistd.h>

#  include <climits>
#else
#  include <ucontext.h>

#  include <csetjmp>
#endif

#include "../table.h"

#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define FASTMAML_DEVICE inline
#define FASTMAML_HAS_TEAM 1

namespace fastmaml::emulation {

struct Index {
  unsigned x = 0;
};

// One shuffle at a time: each lane leaves a number, waits for the others, takes another's, and waits again; a
// product of tiles is the same with the registers of the operands. Relaxed atomics order nothing for
// ThreadSanitizer, as a shuffle orders no memory.
struct Warp {
  std::atomic<unsigned> arrived{0}, turn{0};
  std::atomic<uint64_t> left[32];
  std::atomic<uint32_t> operands[32][6];
};

constexpr unsigned resident = 2;  // teams that run at once

// The shared memory of a block, allocated to the byte, so that AddressSanitizer sees what lies beyond. It
// starts as NaN.
using Memory = std::vector<char>;

enum class State { running, at_team, at_grid, in_warp, finished };

struct Thread {
  Index index, block, threads, blocks;
  unsigned rank = 0;         // of the block in its team
  Memory* shared = nullptr;  // of the first block of its team; those of the others follow
  Warp* warp = nullptr;
  State state = State::running;
  int line = 0;        // of the barrier that it waits at
  unsigned waits = 0;  // that are behind it
#ifndef FASTMAML_EMULATE_THREADS
  ucontext_t context;
  jmp_buf jump;
  bool started = false;
#endif
};

inline thread_local Thread* current = nullptr;
inline std::mutex one_launch;
inline int64_t launches;  // so far
inline cuda::Team shape;  // of the launch's teams
inline unsigned team_threads() { return shape.blocks * shape.threads; }

[[noreturn]] inline void fail(const std::string& what) {
  std::fprintf(stderr, "fastmaml emulation: %s\n", what.c_str());
  std::abort();
}

#ifdef FASTMAML_EMULATE_THREADS
inline pthread_barrier_t of_team[resident], of_grid;
inline void wait_for(State others, int) {
  const unsigned team = current->block.x / shape.blocks;
  pthread_barrier_wait(others == State::at_grid ? &of_grid : &of_team[team]);
}
// Until `turn` is another one than `from`, asleep: what spins here would take the core that the others wait
// for. By system calls, for TSan sees no order in them, as there is none in shuffles.
inline void sleep_while(std::atomic<unsigned>& turn, unsigned from) {
  while (turn.load(std::memory_order_relaxed) == from)
    syscall(SYS_futex, &turn, FUTEX_WAIT_PRIVATE, from, nullptr, nullptr, 0);
}
inline void wake(std::atomic<unsigned>& turn) {
  syscall(SYS_futex, &turn, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}
#else
inline std::function<void()> body;
constexpr std::size_t stack_bytes = 256 << 10;
inline std::vector<std::unique_ptr<char[]> > stacks;  // kept from one launch to the next
#  ifdef __SANITIZE_ADDRESS__  // it does not like longjmp from one stack to another; swapcontext is slower
inline ucontext_t scheduler;
inline void yield() { swapcontext(&current->context, &scheduler); }
inline void resume(Thread& t) {
  current = &t;
  swapcontext(&scheduler, &t.context);
}
#  else
inline jmp_buf scheduler;
inline void yield() {
  if (!_setjmp(current->jump)) _longjmp(scheduler, 1);
}
inline void resume(Thread& t) {
  current = &t;
  if (_setjmp(scheduler)) return;
  if (t.started) _longjmp(t.jump, 1);
  t.started = true;
  setcontext(&t.context);
}
#  endif
inline void wait_for(State others, int line) {
  current->state = others;
  current->line = line;
  yield();
  ++current->waits;
}
inline void sleep_while(std::atomic<unsigned>& turn, unsigned from) {
  while (turn.load(std::memory_order_relaxed) == from) yield();
}
inline void wake(std::atomic<unsigned>&) {}
inline void fiber() {
  for (;;) {
    body();
    current->state = State::finished;
    yield();
  }
}
#endif

inline void wait_for_warp() {
  Warp& w = *current->warp;
  ++current->waits;
  const unsigned turn = w.turn.load(std::memory_order_relaxed);
  if (w.arrived.fetch_add(1, std::memory_order_relaxed) + 1 == 32) {
    w.arrived.store(0, std::memory_order_relaxed);
    w.turn.store(turn + 1, std::memory_order_relaxed);
    wake(w.turn);
    return;
  }
  current->state = State::in_warp;
  sleep_while(w.turn, turn);
  current->state = State::running;
}

// of all 32 lanes
template <class T>
T shuffle_xor(T v, unsigned mask) {
  Warp& w = *current->warp;
  const unsigned lane = current->index.x % 32;
  uint64_t bits = 0;
  std::memcpy(&bits, &v, sizeof(T));
  w.left[lane].store(bits, std::memory_order_relaxed);
  wait_for_warp();
  bits = w.left[lane ^ mask].load(std::memory_order_relaxed);
  wait_for_warp();
  std::memcpy(&v, &bits, sizeof(T));
  return v;
}

inline uint32_t bits_of(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  return bits;
}
inline float float_of(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}
// to bfloat16, ties to even, and back
inline float bf16_of(float v) {
  const uint32_t bits = bits_of(v);
  return v != v ? v : float_of((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u);
}

// Tiles A [16, depth] and B [depth, 8] lie in the registers of the lanes as PTX says: A(i, k), B(k, j) and
// sum(i, j) in those of lane 4 (i % 8) + k / in % 4, 4 j + k / in % 4 and 4 (i % 8) + j / 2, where a register
// holds `in` numbers along k; the sums are taken in order.
template <cuda::Precision P, class Sums>
void multiply_tiles(Sums& sum, const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Warp& w = *current->warp;
  const int lane = static_cast<int>(current->index.x % 32), in = P == cuda::bf16 ? 2 : 1;
  for (int r = 0; r < 6; ++r) w.operands[lane][r].store(r < 4 ? a[r] : b[r - 4], std::memory_order_relaxed);
  wait_for_warp();
  auto number = [&](int from, int r, int k) {
    const uint32_t bits = w.operands[from][r].load(std::memory_order_relaxed);
    if (P == cuda::tf32) return float_of(bits & 0xffffe000u);
    return float_of(k % 2 ? bits & 0xffff0000u : bits << 16);
  };
  for (int c = 0; c < 4; ++c) {
    const int i = lane / 4 + 8 * (c / 2), j = 2 * (lane % 4) + c % 2;
    for (int k = 0; k < 8 * in; ++k) {
      const int column = k / in % 4, half = k / (4 * in);
      sum[c / 2].at[c % 2] +=
          number(4 * (i % 8) + column, i / 8 + 2 * half, k) * number(4 * j + column, 4 + half, k);
    }
  }
  wait_for_warp();
}

#ifdef FASTMAML_EMULATE_THREADS
inline void run(std::vector<Thread>& all, const std::function<void()>& f) {
  const unsigned teams = static_cast<unsigned>(all.size()) / team_threads();
  for (unsigned t = 0; t < teams; ++t) pthread_barrier_init(&of_team[t], nullptr, team_threads());
  pthread_barrier_init(&of_grid, nullptr, static_cast<unsigned>(all.size()));
  std::vector<std::thread> running;
  for (Thread& t : all)
    running.emplace_back([&f, &t] {
      current = &t;
      f();
    });
  for (std::thread& t : running) t.join();
  for (unsigned t = 0; t < teams; ++t) pthread_barrier_destroy(&of_team[t]);
  pthread_barrier_destroy(&of_grid);
}
#else
// The order in which threads run between two barriers: FASTMAML_EMULATE_ORDER, forward, reverse, or
// random:SEED.
struct Order {
  std::vector<std::size_t> threads;
  std::mt19937 generator;
  bool random = false;

  explicit Order(std::size_t n) : threads(n) {
    const char* const given = std::getenv("FASTMAML_EMULATE_ORDER");
    const std::string name = given ? given : "forward";
    for (std::size_t i = 0; i < n; ++i) threads[i] = name == "reverse" ? n - 1 - i : i;
    random = name.rfind("random:", 0) == 0;
    if (random) generator.seed(static_cast<unsigned>(std::strtoul(name.c_str() + 7, nullptr, 10)));
    if (!random && name != "forward" && name != "reverse")
      fail("FASTMAML_EMULATE_ORDER must be forward, reverse or random:SEED, got " + name);
  }
  const std::vector<std::size_t>& next() {
    if (random) std::shuffle(threads.begin(), threads.end(), generator);
    return threads;
  }
};

inline bool waits(const Thread& t) {
  return t.state == State::at_team || t.state == State::at_grid || t.state == State::finished;
}

// Runs every thread to its next barrier, or to its end: true if that was the end of all.
inline bool run_to_barrier(std::vector<Thread>& all, Order& order) {
  for (bool again = true; again;) {
    again = false;
    for (std::size_t i : order.next()) {
      Thread& t = all[i];
      if (waits(t)) continue;
      resume(t);
      again |= t.state == State::in_warp;
    }
  }
  bool at_grid = true, finished = true;
  for (std::size_t i = 0; i < all.size(); ++i) {
    const Thread &t = all[i], &first = all[i / team_threads() * team_threads()];
    if (t.state != first.state) fail("some threads of a team ended, others wait at a barrier");
    if (t.line != first.line) fail("threads of a team wait at different barriers");
    at_grid &= t.state == State::at_grid;
    finished &= t.state == State::finished;
  }
  if (finished) return true;
  bool any = at_grid;
  for (Thread& t : all) {
    any |= t.state == State::at_team;
    if (t.state == State::at_team || at_grid) t.state = State::running;
  }
  if (!any) fail("some teams ended, others wait for them");
  return false;
}

inline void run(std::vector<Thread>& all, const std::function<void()>& f) {
  Order order(all.size());
  body = f;
  while (stacks.size() < all.size()) stacks.emplace_back(new char[stack_bytes]);
  for (std::size_t i = 0; i < all.size(); ++i) {
    Thread& t = all[i];
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = stacks[i].get(), t.context.uc_stack.ss_size = stack_bytes;
    t.context.uc_link = nullptr;
    makecontext(&t.context, fiber, 0);
  }
  while (!run_to_barrier(all, order)) {
  }
}
#endif

}  // namespace fastmaml::emulation

#define threadIdx (fastmaml::emulation::current->index)
#define blockIdx (fastmaml::emulation::current->block)
#define blockDim (fastmaml::emulation::current->threads)
#define gridDim (fastmaml::emulation::current->blocks)
#define sync_team() fastmaml::emulation::wait_for(fastmaml::emulation::State::at_team, __LINE__)
#define sync_grid() fastmaml::emulation::wait_for(fastmaml::emulation::State::at_grid, __LINE__)
#define __shfl_xor_sync(mask, v, lanes) fastmaml::emulation::shuffle_xor(v, lanes)

namespace fastmaml::cuda {

template <class T>
FASTMAML_DEVICE T* own_shared() {
  return reinterpret_cast<T*>(emulation::current->shared[emulation::current->rank].data());
}
template <class T>
FASTMAML_DEVICE T* shared_of(unsigned block, T* own) {
  if (block >= emulation::shape.blocks) emulation::fail("there is no such block in the cluster");
  return reinterpret_cast<T*>(emulation::current->shared[block].data()) + (own - own_shared<T>());
}
FASTMAML_DEVICE unsigned cluster_rank() { return emulation::current->rank; }
FASTMAML_DEVICE unsigned cluster_blocks() { return emulation::shape.blocks; }
FASTMAML_DEVICE unsigned shared_bytes() { return unsigned(emulation::shape.bytes); }
FASTMAML_DEVICE unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }

// as the instructions round: TF32 keeps 10 bits, ties away from zero
inline uint32_t to_tf32(float v) {
  return v != v ? emulation::bits_of(v) : (emulation::bits_of(v) + 0x1000) & 0xffffe000u;
}
inline uint32_t to_bf16(float low, float high) {
  return emulation::bits_of(emulation::bf16_of(low)) >> 16 |
         (emulation::bits_of(emulation::bf16_of(high)) & 0xffff0000u);
}
template <Precision P, class Sums>
void multiply_add(Sums& sum, const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulation::multiply_tiles<P>(sum, a, b);
}

// those of sm_90 and sm_100
inline int shared_limit(int) { return 227 << 10; }
inline bool has_clusters(int) { return true; }
template <class... Parameters>
int has_code(void (*)(Parameters...), int) {
  return 0;
}
inline int devices() { return 0; }
inline int use(int) { return 0; }
inline const char* error_text(int) { return "the emulation has no such error"; }

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), unsigned teams, const Team& team, void*,
           const Arguments&... arguments) {
  const std::lock_guard<std::mutex> alone(emulation::one_launch);
  if (team.threads % 32) emulation::fail("a block must be whole warps");
  emulation::shape = team;
  ++emulation::launches;
  const unsigned blocks = std::min(teams, emulation::resident) * team.blocks;
  std::vector<emulation::Memory> memory(blocks, emulation::Memory(team.bytes, static_cast<char>(0xff)));
  std::vector<emulation::Warp> warps(blocks * team.threads / 32);
  std::vector<emulation::Thread> all(blocks * team.threads);
  for (unsigned i = 0; i < all.size(); ++i) {
    emulation::Thread& t = all[i];
    t.index.x = i % team.threads, t.threads.x = team.threads;
    t.block.x = i / team.threads, t.blocks.x = blocks;
    t.rank = t.block.x % team.blocks;
    t.shared = &memory[t.block.x - t.rank];
    t.warp = &warps[i / 32];
    if (reinterpret_cast<uintptr_t>(t.shared->data()) % 16) emulation::fail("shared memory is not aligned");
  }
  emulation::run(all, [&] { kernel(arguments...); });
  emulation::current = nullptr;
  return 0;
}

}  // namespace fastmaml::cuda
