#include "arena.h"

#include <algorithm>
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
constexpr std::align_val_t kAlign{64};

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
  data_ = ::operator new(bytes_, kAlign);
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
  for (const Block& b : old) ::operator delete(b.data, kAlign);
}

}  // namespace fastmaml
