// Counts bank conflicts: linked with the emulation compiled with -fsanitize=thread, whose calls before each
// access it takes instead of ThreadSanitizer.
//
// The accesses of a warp that are one instruction of the GPU's are those of its lanes that come from one
// place of the code, are the same in number there since the last wait, and as wide. This is the source's own
// access pattern as a host compiler has it; nvcc may read a number less often, or two of them at once.
#include <map>
#include <set>
#include <tuple>
#include <utility>

#include "device.h"

namespace fastmaml::emulation {

struct Access {
  unsigned lanes = 0;
  uint32_t at[32] = {};  // in shared memory, in bytes
};
using Site = std::tuple<const Warp*, unsigned, const void*, unsigned>;  // ., waits, place, size
struct Banks {
  std::map<Site, std::vector<Access>> accesses;
  std::map<std::pair<const Thread*, const void*>, std::pair<unsigned, std::size_t>> seen;  // in these waits
  int64_t total = 0, conflicted = 0, worst = 1, rounds = 0, least = 0;

  // A round serves each of the 32 banks of 4 bytes with one word; of wide accesses 16 or 8 lanes at a time.
  void count(const Access& access, unsigned size) {
    const unsigned together = size <= 4 ? 32 : 128 / size;
    int64_t ways = 1;
    for (unsigned first = 0; first < 32; first += together) {
      std::set<uint32_t> words[32];
      std::size_t most = 0;
      for (unsigned lane = first; lane < first + together; ++lane)
        for (uint32_t word = access.at[lane] / 4; word < (access.at[lane] + size + 3) / 4; ++word)
          if (access.lanes >> lane & 1) words[word % 32].insert(word);
      for (const auto& bank : words) most = std::max(most, bank.size());
      rounds += int64_t(most), least += most > 0;
      ways = std::max(ways, int64_t(most));
    }
    ++total;
    conflicted += ways > 1;
    worst = std::max(worst, ways);
  }

  void note(const char* p, unsigned size, const void* place) {
    Thread& t = *current;
    const Memory& memory = t.shared[t.rank];
    if (p < memory.data() || p >= memory.data() + memory.size()) return;
    auto& [waits, n] = seen[{&t, place}];
    if (waits != t.waits) waits = t.waits, n = 0;
    std::vector<Access>& all = accesses[{t.warp, t.waits, place, size}];
    if (all.size() <= n) all.resize(n + 1);
    Access& access = all[n++];
    access.lanes |= 1u << t.index.x % 32;
    access.at[t.index.x % 32] = static_cast<uint32_t>(p - memory.data());
  }
};
Banks banks;
bool counting = false;  // standard containers are instrumented too

inline void note(const void* p, unsigned size, const void* place) {
  if (counting || current == nullptr) return;
  counting = true;
  banks.note(static_cast<const char*>(p), size, place);
  counting = false;
}

}  // namespace fastmaml::emulation

// found: of the launch since the last call the accesses, those with conflicts, the worst of them in ways, the
// rounds that all take and those that they would without conflicts
extern "C" __attribute__((visibility("default"))) void fastmaml_cuda_banks(int64_t* found) {
  using namespace fastmaml::emulation;
  counting = true;
  for (const auto& [site, all] : banks.accesses)
    for (const Access& access : all) banks.count(access, std::get<3>(site));
  for (int64_t n : {banks.total, banks.conflicted, banks.worst, banks.rounds, banks.least}) *found++ = n;
  banks = Banks{};
  counting = false;
}

#define FASTMAML_ACCESS(size)                                                                          \
  void __tsan_read##size(void* p) { fastmaml::emulation::note(p, size, __builtin_return_address(0)); } \
  void __tsan_write##size(void* p) { fastmaml::emulation::note(p, size, __builtin_return_address(0)); }
#define FASTMAML_ATOMIC(bits)                                                            \
  uint##bits##_t __tsan_atomic##bits##_load(const uint##bits##_t* p, int) { return *p; } \
  void __tsan_atomic##bits##_store(uint##bits##_t* p, uint##bits##_t v, int) { *p = v; }
extern "C" {
FASTMAML_ACCESS(1)
FASTMAML_ACCESS(2)
FASTMAML_ACCESS(4)
FASTMAML_ACCESS(8)
FASTMAML_ACCESS(16)
FASTMAML_ATOMIC(32)  // of one thread, as fibers are
FASTMAML_ATOMIC(64)
uint32_t __tsan_atomic32_fetch_add(uint32_t* p, uint32_t v, int) { return std::exchange(*p, *p + v); }
void __tsan_read_range(void*, long) {}  // of tables, none in shared memory
void __tsan_write_range(void*, long) {}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
}
