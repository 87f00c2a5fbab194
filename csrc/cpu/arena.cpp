#include "arena.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <thread>

namespace fastmaml {
namespace {

// For tests: nothing is kept, so that reads and writes outside of what was asked for are seen, and everything
// is NaN before it is written.
#if defined(__has_feature)
#  if __has_feature(address_sanitizer)
#    define FASTMAML_EXACT
#  endif
#elif defined(__SANITIZE_ADDRESS__)
#  define FASTMAML_EXACT
#endif
// bytes of all that is kept
#if defined(FASTMAML_EXACT)
constexpr std::size_t kKept = 0;
#else
constexpr std::size_t kKept = std::size_t(256) << 20;
#endif
constexpr std::size_t kHuge = std::size_t(2) << 20;  // a large page

struct Block {
  void* data;
  std::size_t bytes;
};

// The blocks, oldest first. Whoever finds them locked for long goes without: another thread was at them when
// this process was forked.
struct Kept {
  static constexpr int most = 64;
  std::mutex mutex;
  Block blocks[most];
  int count = 0;
  std::size_t bytes = 0;

  std::unique_lock<std::mutex> lock() {
    std::unique_lock<std::mutex> lock(mutex, std::try_to_lock);
    for (int tries = 0; tries < 1000 && !lock; ++tries) {
      std::this_thread::yield();
      lock.try_lock();
    }
    return lock;
  }

  Block take(int i) {
    const Block block = blocks[i];
    std::copy(blocks + i + 1, blocks + count--, blocks + i);
    bytes -= block.bytes;
    return block;
  }
};

Kept& kept() {
  static Kept* const one = new Kept;  // outlives every thread that may still return something
  return *one;
}

// A block of a large page or more lies in such, where the system lends them: the kernels walk down columns of
// matrices, and with small pages miss the table of them (TLB) every few rows.
void* allocate(std::size_t bytes) {
  const std::size_t align = bytes >= kHuge ? kHuge : 64;
  void* const data = std::aligned_alloc(align, (bytes + align - 1) / align * align);
  if (!data) throw std::bad_alloc();
#if defined(FASTMAML_EXACT)
  std::memset(data, 0xff, (bytes + align - 1) / align * align);
#endif
#if defined(MADV_HUGEPAGE)
  if (align == kHuge) madvise(data, bytes, MADV_HUGEPAGE);
#endif
  return data;
}

}  // namespace

Arena::Arena(std::size_t bytes) : data_(nullptr), bytes_(std::max<std::size_t>(bytes, 1)) {
  Kept& k = kept();
  {
    const auto lock = k.lock();
    int best = -1;  // the smallest that fits, unless most of it would lie idle
    for (int i = 0; lock.owns_lock() && i < k.count; ++i)
      if (k.blocks[i].bytes >= bytes_ && k.blocks[i].bytes / 2 <= bytes_ &&
          (best < 0 || k.blocks[i].bytes < k.blocks[best].bytes))
        best = i;
    if (best >= 0) {
      const Block block = k.take(best);
      data_ = block.data, bytes_ = block.bytes;
      return;
    }
  }
  data_ = allocate(bytes_);
}

Arena::~Arena() {
  Kept& k = kept();
  const auto lock = k.lock();
  if (!lock.owns_lock() || bytes_ > kKept) {
    std::free(data_);
    return;
  }
  while (k.count == Kept::most || k.bytes + bytes_ > kKept) std::free(k.take(0).data);
  k.blocks[k.count++] = {data_, bytes_};
  k.bytes += bytes_;
}

}  // namespace fastmaml
