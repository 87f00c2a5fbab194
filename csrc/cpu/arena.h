// Memory that is kept for the next call: a training step's asks for megabytes every time, and pages that are
// new to the process cost more than small nets take to run.
#pragma once
#include <cstddef>

namespace fastmaml {

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
