// How the tasks of a call are divided among its threads, and their sums added up: into sets, each with a sum
// of its own, which are the same for any number of threads, as is the tree of pairs by which the sums are
// added. So every result is.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

namespace fastmaml::FASTMAML_ISA {

// f(i, j) for each node of the tree over the sets from `begin` to `end`: the sum from i on takes that from j
// on
template <class F>
void in_pairs(int64_t begin, int64_t end, const F& f) {
  for (int64_t size = 1; begin + size < end; size *= 2)
    for (int64_t i = begin; i + size < end; i += 2 * size) f(i, i + size);
}

// The sets are run in rounds, of which one is in memory, and these in groups of whole sets, one for a thread.
struct Partition {
  int64_t T = 0, sets = 1;
  std::vector<std::vector<int64_t>> rounds;  // of each: the sets where its groups begin, and its end

  Partition() = default;
  Partition(int64_t T, int64_t sets) : T(T), sets(sets) {}

  // A round of groups that are nodes of the tree, so that a thread adds up its own: long ones first, each as
  // large as leaves the other threads enough to do meanwhile.
  void divide_by_halves(int64_t threads) {
    std::vector<int64_t>& begins = rounds.emplace_back();
    begins.reserve(sets + 1), begins.push_back(0);
    while (begins.back() < sets) {
      const int64_t share = (sets - begins.back() - 1) / threads;
      int64_t size = 1;
      while (2 * size <= share) size *= 2;
      begins.push_back(begins.back() + size);
    }
  }
  // `count` rounds, each of a group for every thread
  void divide_evenly(int64_t threads, int64_t count) {
    for (int64_t r = 0; r < count; ++r) {
      const int64_t begin = sets * r / count, size = sets * (r + 1) / count - begin;
      const int64_t groups = std::min(size, threads);
      rounds.emplace_back();
      for (int64_t j = 0; j <= groups; ++j) rounds.back().push_back(begin + size * j / groups);
    }
  }

  int64_t task(int64_t set) const { return T * set / sets; }  // its first
  int64_t groups(int64_t r) const { return rounds[r].size() - 1; }
  int64_t group(int64_t r, int64_t j) const { return rounds[r][j]; }
  bool begins_group(int64_t r, int64_t set) const {
    return std::binary_search(rounds[r].begin(), rounds[r].end(), set);
  }
  int64_t largest_group() const {
    int64_t most = 1;
    for (const auto& begins : rounds)
      for (std::size_t j = 1; j < begins.size(); ++j)
        most = std::max(most, task(begins[j]) - task(begins[j - 1]));
    return most;
  }
};

}  // namespace fastmaml::FASTMAML_ISA
