// SPDX-License-Identifier: Apache-2.0
#pragma once

// Memory for tensors that is kept and used again. malloc gives large blocks back to the system and maps them
// anew: every step then pays for the same pages again, 4 KiB at a time, which took a quarter of an MoE
// layer's time. Here a step finds its memory where the step before left it, in pages of 2 MiB where the
// system has them.

#include <cstddef>
#include <map>
#include <mutex>
#include <set>
#include <utility>

namespace collegium::ops {

struct ArenaStatistics {
  std::size_t in_use_bytes = 0;
  std::size_t peak_bytes = 0;     ///< most that were in use at a time
  std::size_t touched_bytes = 0;  ///< most that may be resident: the peak and what fragmentation adds
};

/// One range of addresses, cut into blocks: the smallest free block that fits, and neighbours are joined when
/// they become free. Thread-safe. Memory is never given back.
class Arena {
 public:
  static constexpr std::size_t kAlignment = 64;  ///< bytes: a cache line, and the widest vector

  /// Reserves addresses, not memory: of `capacity_bytes`, or of half as much until the system agrees.
  explicit Arena(std::size_t capacity_bytes);
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  /// nullptr when no free block is large enough; `bytes` must not be 0.
  void* allocate(std::size_t bytes);
  /// `block` must come from allocate().
  void deallocate(void* block);
  bool owns(const void* block) const { return block >= base_ && block < base_ + capacity_; }
  ArenaStatistics statistics() const;
  /// The peak counts from now on.
  void reset_peak();

 private:
  void add_free(char* begin, std::size_t bytes);
  void remove_free(std::map<char*, std::size_t>::iterator block);

  char* base_ = nullptr;
  std::size_t capacity_ = 0;
  mutable std::mutex mutex_;
  std::map<char*, std::size_t> free_by_address_;
  std::set<std::pair<std::size_t, char*>> free_by_size_;
  std::map<char*, std::size_t> used_;
  ArenaStatistics statistics_;
};

/// What     From now on the CPU tensors of this process that are large enough come from one arena as
///          large as the machine's memory; the others, and those that do not fit, from malloc. Call it
///          once, before the first tensor.
void install_arena();

/// What     Of the installed arena; zeros without one.
ArenaStatistics arena_statistics();
/// What     The installed arena's peak counts from now on.
void reset_arena_peak();

}  // namespace collegium::ops
