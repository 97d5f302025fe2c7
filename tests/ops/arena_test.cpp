// SPDX-License-Identifier: Apache-2.0
#include "collegium/ops/arena.h"

#include <gtest/gtest.h>

#include <cstring>
#include <limits>
#include <thread>
#include <vector>

#include "collegium/base/error.h"
#include "collegium/base/rng.h"

namespace collegium {
namespace {

constexpr std::size_t kMiB = std::size_t{1} << 20U;

TEST(Arena, freed_memory_is_used_again_and_neighbours_join) {
  ops::Arena arena(4 * kMiB);
  void* a = arena.allocate(kMiB);
  void* b = arena.allocate(kMiB);
  void* c = arena.allocate(kMiB);
  arena.deallocate(a);
  EXPECT_EQ(arena.allocate(kMiB), a);
  arena.deallocate(a);
  arena.deallocate(c);
  EXPECT_EQ(arena.allocate(3 * kMiB), nullptr);
  arena.deallocate(b);
  EXPECT_EQ(arena.allocate(4 * kMiB), a);
}

TEST(Arena, neither_nothing_nor_more_than_all_is_given) {
  ops::Arena arena(4 * kMiB);
  EXPECT_THROW(arena.allocate(0), InternalError);
  EXPECT_EQ(arena.allocate(std::numeric_limits<std::size_t>::max() - 1), nullptr);
  EXPECT_NE(arena.allocate(4 * kMiB), nullptr);
}

TEST(Arena, the_smallest_block_that_fits_is_taken) {
  ops::Arena arena(16 * kMiB);
  void* large = arena.allocate(4 * kMiB);
  void* wall = arena.allocate(kMiB);
  void* small = arena.allocate(2 * kMiB);
  void* end = arena.allocate(kMiB);
  arena.deallocate(large);
  arena.deallocate(small);
  EXPECT_EQ(arena.allocate(2 * kMiB), small);
  EXPECT_EQ(arena.allocate(3 * kMiB), large);
  arena.deallocate(wall);
  arena.deallocate(end);
}

TEST(Arena, counts_use_peak_and_reach) {
  ops::Arena arena(8 * kMiB);
  void* a = arena.allocate(kMiB);
  void* b = arena.allocate(2 * kMiB);
  arena.deallocate(a);
  EXPECT_EQ(arena.statistics().in_use_bytes, 2 * kMiB);
  EXPECT_EQ(arena.statistics().peak_bytes, 3 * kMiB);
  EXPECT_EQ(arena.statistics().touched_bytes, 3 * kMiB);
  arena.reset_peak();
  EXPECT_EQ(arena.statistics().peak_bytes, 2 * kMiB);
  arena.deallocate(b);
  EXPECT_EQ(arena.statistics().in_use_bytes, 0U);
}

TEST(Arena, a_foreign_block_is_refused) {
  ops::Arena arena(kMiB);
  void* block = arena.allocate(1000);
  EXPECT_THROW(arena.deallocate(static_cast<char*>(block) + 64), InternalError);
  arena.deallocate(block);
  EXPECT_THROW(arena.deallocate(block), InternalError);
}

// Four threads take, fill, check and give back blocks of many sizes: no two blocks overlap, all are aligned,
// and in the end one free block is left.
TEST(Arena, blocks_never_overlap_under_threads) {
  ops::Arena arena(64 * kMiB);
  const auto work = [&arena](int thread) {
    const RandomStream random(static_cast<std::uint64_t>(thread), "arena");
    std::vector<std::pair<unsigned char*, std::size_t>> blocks;
    for (std::uint64_t i = 0; i < 400; ++i) {
      const std::size_t bytes = 1 + random.bits(i) % (512U << 10U);
      auto* block = static_cast<unsigned char*>(arena.allocate(bytes));
      ASSERT_NE(block, nullptr);
      EXPECT_EQ(reinterpret_cast<std::uintptr_t>(block) % ops::Arena::kAlignment, 0U);
      std::memset(block, thread, bytes);
      blocks.emplace_back(block, bytes);
      if (blocks.size() < 12) continue;
      const std::size_t victim = random.bits(i + 1000) % blocks.size();
      const auto [begin, size] = blocks[victim];
      for (const std::size_t at : {std::size_t{0}, size / 2, size - 1}) EXPECT_EQ(begin[at], thread);
      arena.deallocate(begin);
      blocks.erase(blocks.begin() + static_cast<std::ptrdiff_t>(victim));
    }
    for (const auto& [begin, size] : blocks) arena.deallocate(begin);
  };
  std::vector<std::thread> threads;
  for (int thread = 1; thread <= 4; ++thread) threads.emplace_back(work, thread);
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(arena.statistics().in_use_bytes, 0U);
  EXPECT_NE(arena.allocate(64 * kMiB), nullptr);
}

}  // namespace
}  // namespace collegium
