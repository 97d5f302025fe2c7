// SPDX-License-Identifier: Apache-2.0
#pragma once

// Rows of all ranks of a group in memory that all of them read: every rank writes its own part, they meet,
// and from then on each reads all parts. Memory is used again, since its pages cost more than what is written
// to them; who may write to it when follows from meetings alone.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <vector>

#include "collegium/comm/communicator.h"
#include "collegium/comm/shared_memory.h"

namespace collegium::moe {

/// A rank's part of the rows of all ranks, which lie in rank order.
struct RowShare {
  std::int64_t first = 0;
  std::int64_t rows = 0;
  std::int64_t total = 0;

  at::Tensor of(const at::Tensor& all_XD) const { return all_XD.narrow(0, first, rows); }
};

/// The memory is in use as long as any of the two tensors, or a view of one, exists.
struct [[nodiscard]] SharedRows {
  at::Tensor all_XD;  ///< to be read after a meeting
  at::Tensor own_XD;  ///< to be written before it
  std::int64_t buffer = 0;
};

class RowMeeting;

/// Every rank makes the same calls in the same order, with the same totals, and lets go of rows at the same
/// place among them: so all ranks find the same memory free without asking. Meetings check it.
class SharedRowPool : public std::enable_shared_from_this<SharedRowPool> {
 public:
  explicit SharedRowPool(std::shared_ptr<comm::Communicator> group) : group_(std::move(group)) {}

  /// What     Rows of `width` values, not initialised.
  /// Comm     where no free memory is large enough, comm::SharedMemory::create(); else none.
  SharedRows take(const RowShare& share, std::int64_t width, at::ScalarType dtype);
  /// The same with a copy of this rank's rows in it.
  SharedRows copy(const at::Tensor& rows_XD, const RowShare& share);

  /// What     When its wait() returns, every rank has written its part of these rows, and is done with all
  ///          that it had let go of when it came.
  /// Comm     an all_gather of 8 bytes per entry, at least one.
  RowMeeting meet(std::span<const SharedRows> rows);

 private:
  friend class RowMeeting;
  struct Buffer {
    std::shared_ptr<comm::SharedMemory> memory;
    bool in_use = false;
    // Meetings begun when it was let go of: others may read it until the next one is over.
    std::int64_t begun_before = 0;
  };

  bool is_free(const Buffer& buffer) const { return !buffer.in_use && buffer.begun_before < meetings_over_; }
  std::int64_t find_or_make(std::int64_t bytes);
  void let_go(std::int64_t number);

  std::shared_ptr<comm::Communicator> group_;
  std::map<std::int64_t, Buffer> buffers_;  // by number, in the order in which they were made
  std::int64_t next_number_ = 0;
  std::int64_t meetings_begun_ = 0;
  std::int64_t meetings_over_ = 0;
};

/// A meeting of the ranks under way; wait() is called once.
class [[nodiscard]] RowMeeting {
 public:
  /// Throws   Error when ranks do not share the same memory: they made different calls.
  void wait();

 private:
  friend class SharedRowPool;
  std::shared_ptr<SharedRowPool> pool_;
  std::int64_t number_ = 0;
  at::Tensor buffers_1X_;  // of this rank
  at::Tensor buffers_YX_;  // of all ranks
  comm::Work work_;
};

}  // namespace collegium::moe
