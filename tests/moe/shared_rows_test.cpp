// SPDX-License-Identifier: Apache-2.0

// What ranks write before a meeting they all read after it, and memory is used again no earlier than all are
// done with it.

#include "collegium/moe/shared_rows.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/equal.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <optional>

#include "collegium/base/error.h"
#include "collegium/comm/local/local.h"

namespace collegium {
namespace {

using moe::RowShare;
using moe::SharedRowPool;
using moe::SharedRows;

constexpr std::int64_t kWidth = 3;

// Rank r has r rows: none on rank 0.
RowShare share_of(const comm::Communicator& group) {
  const std::int64_t rank = group.rank();
  const std::int64_t size = group.size();
  return {.first = rank * (rank - 1) / 2, .rows = rank, .total = size * (size - 1) / 2};
}

// A pool, and rows that are always in use, for meetings about nothing else.
class Pool {
 public:
  explicit Pool(comm::Communicator& group)
      : pool_(std::make_shared<SharedRowPool>(group.shared_from_this())),
        marker_{pool_->take({.first = 0, .rows = 1, .total = 1}, 1, at::kByte)} {}

  moe::RowMeeting begin_meeting() { return pool_->meet(marker_); }
  void meet() { begin_meeting().wait(); }
  SharedRowPool* operator->() { return pool_.get(); }

 private:
  std::shared_ptr<SharedRowPool> pool_;
  std::array<SharedRows, 1> marker_;
};

TEST(SharedRows, all_ranks_read_what_each_has_written) {
  for (const int ranks : {1, 2, 3, 4, 7}) {
    comm::run_ranks(ranks, [](comm::Communicator& group) {
      Pool pool(group);
      const RowShare share = share_of(group);
      for (int round = 0; round < 20; ++round) {
        const auto expected =
            at::arange(share.total * kWidth, at::kDouble).view({share.total, kWidth}) + round;
        const std::array<SharedRows, 1> rows = {pool->copy(share.of(expected), share)};
        pool->meet(rows).wait();
        EXPECT_TRUE(at::equal(rows[0].all_XD, expected)) << "rank " << group.rank() << ", round " << round;
      }
    });
  }
}

TEST(SharedRows, memory_is_used_again_after_the_next_meeting) {
  comm::run_ranks(2, [](comm::Communicator& group) {
    Pool pool(group);
    const RowShare share = share_of(group);
    const auto take = [&] { return pool->take(share, kWidth, at::kFloat).buffer; };  // and let go
    const std::int64_t first = take();
    EXPECT_NE(take(), first);  // the other rank may still read it
    pool.meet();
    EXPECT_EQ(take(), first);
    auto under_way = pool.begin_meeting();
    const std::int64_t third = take();
    EXPECT_NE(third, first);  // let go of before the meeting, which is not over
    under_way.wait();
    const SharedRows held = pool->take(share, kWidth, at::kFloat);
    EXPECT_EQ(held.buffer, first);
    EXPECT_NE(take(), third);  // let go of after the meeting had begun
  });
}

TEST(SharedRows, views_keep_memory_in_use_even_without_the_pool) {
  comm::run_ranks(2, [](comm::Communicator& group) {
    auto pool = std::make_unique<Pool>(group);
    const RowShare share{.first = std::int64_t{2} * group.rank(), .rows = 2, .total = 4};
    SharedRows rows = (*pool)->take(share, kWidth, at::kDouble);
    const std::int64_t number = rows.buffer;
    const at::Tensor view = rows.own_XD.select(0, 1);
    rows = {};
    pool->meet();
    EXPECT_NE((*pool)->take(share, kWidth, at::kDouble).buffer, number);
    pool->meet();
    pool = nullptr;
    view.fill_(7.0);
    EXPECT_EQ(view.sum().item<double>(), 7.0 * kWidth);
  });
}

TEST(SharedRows, larger_memory_takes_the_place_of_what_is_too_small) {
  comm::run_ranks(2, [](comm::Communicator& group) {
    Pool pool(group);
    const auto take = [&](std::int64_t rows) {
      const RowShare share{.first = 0, .rows = rows, .total = rows};
      const std::int64_t number = pool->take(share, 1024, at::kDouble).buffer;
      pool.meet();
      return number;
    };
    const std::int64_t small = take(10);
    const std::int64_t large = take(100);
    EXPECT_NE(large, small);
    EXPECT_EQ(take(10), large);  // the small one has gone
    EXPECT_EQ(take(100), large);
  });
}

TEST(SharedRows, ranks_that_let_go_at_different_places_are_noticed) {
  try {
    comm::run_ranks(2, [](comm::Communicator& group) {
      Pool pool(group);
      const RowShare share = share_of(group);
      std::optional<SharedRows> first = pool->take(share, kWidth, at::kFloat);
      std::optional<SharedRows> second = pool->take(share, kWidth, at::kFloat);
      if (group.rank() == 1) first.reset();
      second.reset();
      pool.meet();
      const std::array<SharedRows, 1> rows = {pool->take(share, kWidth, at::kFloat)};
      pool->meet(rows).wait();
    });
    FAIL() << "was not noticed";
  } catch (const InternalError& error) {
    EXPECT_THAT(error.what(), testing::HasSubstr("do not share the same memory"));
  }
}

}  // namespace
}  // namespace collegium
