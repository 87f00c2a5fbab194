#include "arena.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

namespace fastmaml {
namespace {

// bytes of all that is kept; nothing where reads and writes outside of what was asked for are to be seen
#if defined(__SANITIZE_ADDRESS__)
constexpr std::size_t kKept = 0;
#else
constexpr std::size_t kKept = std::size_t(32) << 20;
#endif
constexpr std::size_t kHuge = std::size_t(2) << 20;  // a large page

// Blocks of several large pages lie in such, where the system lends them: the kernels walk down columns of
// matrices, and with small pages miss the table of them (TLB) every few rows.
void* allocate(std::size_t bytes) {
  const std::size_t align = bytes >= kHuge ? kHuge : 64;
  void* const data = std::aligned_alloc(align, (bytes + align - 1) / align * align);
  if (!data) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
  if (align == kHuge) madvise(data, bytes, MADV_HUGEPAGE);
#endif
  return data;
}

struct Block {
  void* data;
  std::size_t bytes;
};

struct Kept {
  std::mutex mutex;
  std::vector<Block> blocks;  // the one returned last is at the end
  std::size_t bytes = 0;
};

Kept& kept() {
  static Kept* const one = new Kept;  // outlives every thread that may still return something
  return *one;
}

}  // namespace

Arena::Arena(std::size_t bytes) : data_(nullptr), bytes_(std::max<std::size_t>(bytes, 1)) {
  {
    Kept& k = kept();
    std::lock_guard<std::mutex> lock(k.mutex);
    // the smallest that fits, unless most of it would lie idle
    auto best = k.blocks.end();
    for (auto b = k.blocks.begin(); b != k.blocks.end(); ++b)
      if (b->bytes >= bytes_ && b->bytes / 2 <= bytes_ && (best == k.blocks.end() || b->bytes < best->bytes))
        best = b;
    if (best != k.blocks.end()) {
      data_ = best->data, bytes_ = best->bytes;
      k.bytes -= bytes_;
      k.blocks.erase(best);
      return;
    }
  }
  data_ = allocate(bytes_);
}

Arena::~Arena() {
  std::vector<Block> old;  // is freed without the lock
  {
    Kept& k = kept();
    std::lock_guard<std::mutex> lock(k.mutex);
    if (bytes_ > kKept) {
      old.push_back({data_, bytes_});
    } else {
      k.blocks.push_back({data_, bytes_});
      k.bytes += bytes_;
      for (; k.bytes > kKept; k.blocks.erase(k.blocks.begin())) {
        old.push_back(k.blocks.front());
        k.bytes -= old.back().bytes;
      }
    }
  }
  for (const Block& b : old) std::free(b.data);
}

}  // namespace fastmaml
