// Memory that is kept for the next call: a training step's asks for megabytes every time, and pages that are
// new to the process cost more than small nets take to run.
#pragma once
#include <cstddef>
#include <new>
#include <vector>

namespace fastmaml {

// What a thread writes all the time has cache lines to itself, in the pairs that are fetched together: a
// thread that writes to a line of another's waits for it (measured, 2 threads: 16 % of a small network's
// task).
constexpr std::size_t line_pair = 128;

template <class T>
struct Apart {
  using value_type = T;
  Apart() = default;
  template <class U>
  Apart(const Apart<U>&) {}
  T* allocate(std::size_t n) {
    const std::size_t bytes = (n * sizeof(T) + line_pair - 1) / line_pair * line_pair;
    return static_cast<T*>(::operator new(bytes, std::align_val_t(line_pair)));
  }
  void deallocate(T* p, std::size_t) { ::operator delete(p, std::align_val_t(line_pair)); }
  friend bool operator==(const Apart&, const Apart&) { return true; }
  friend bool operator!=(const Apart&, const Apart&) { return false; }
};
template <class T>
using OwnVector = std::vector<T, Apart<T>>;

class Arena {
 public:
  explicit Arena(std::size_t bytes);
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  void* data() const { return data_; }  // aligned to 64 bytes, with anything in it

 private:
  void* data_;
  std::size_t bytes_;
};

}  // namespace fastmaml
