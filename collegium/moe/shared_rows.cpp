// SPDX-License-Identifier: Apache-2.0
#include "collegium/moe/shared_rows.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <limits>

#include "collegium/base/error.h"
#include "collegium/moe/exchange.h"

namespace collegium::moe {

namespace {

// Sizes differ little from step to step where rows are dropped: an eighth of a power of two.
std::int64_t rounded_bytes(std::int64_t bytes) {
  constexpr std::int64_t kLeast = std::int64_t{1} << 15;
  std::int64_t step = kLeast / 8;
  while (bytes > 8 * step) step *= 2;
  return std::max(kLeast, (bytes + step - 1) / step * step);
}

}  // namespace

SharedRows SharedRowPool::take(const RowShare& share, std::int64_t width, at::ScalarType dtype) {
  COLLEGIUM_CHECK(share.total <= std::numeric_limits<std::int32_t>::max(),
                  "{} rows of all ranks are more than an index of 32 bits reaches", share.total);
  const std::int64_t bytes = share.total * width * static_cast<std::int64_t>(c10::elementSize(dtype));
  const std::int64_t number = find_or_make(rounded_bytes(bytes));
  Buffer& buffer = buffers_.at(number);
  buffer.in_use = true;
  // Tensors may outlive the pool.
  const auto last_use = [pool = weak_from_this(), memory = buffer.memory, number](void*) {
    if (const auto alive = pool.lock()) alive->let_go(number);
  };
  const at::Tensor all_XD =
      at::from_blob(buffer.memory->data(), {share.total, width}, last_use, at::dtype(dtype));
  return {.all_XD = all_XD, .own_XD = share.of(all_XD), .buffer = number};
}

SharedRows SharedRowPool::copy(const at::Tensor& rows_XD, const RowShare& share) {
  COLLEGIUM_CHECK(rows_XD.is_cpu(), "rows on {} cannot be shared, must be on the CPU",
                  rows_XD.device().str());
  SharedRows rows = take(share, rows_XD.size(1), rows_XD.scalar_type());
  rows.own_XD.copy_(rows_XD);
  return rows;
}

std::int64_t SharedRowPool::find_or_make(std::int64_t bytes) {
  auto best = buffers_.end();     // the smallest that is large enough
  auto largest = buffers_.end();  // of those that are too small
  for (auto it = buffers_.begin(); it != buffers_.end(); ++it) {
    if (!is_free(it->second)) continue;
    const std::int64_t size = it->second.memory->bytes();
    if (size >= bytes) {
      if (best == buffers_.end() || size < best->second.memory->bytes()) best = it;
    } else if (largest == buffers_.end() || size > largest->second.memory->bytes()) {
      largest = it;
    }
  }
  if (best != buffers_.end()) return best->first;
  // A larger one takes its place: smaller ones would stay for ever.
  if (largest != buffers_.end()) buffers_.erase(largest);
  const comm::WhereScope scope(group_->where(), at_phase(group_->where(), "shared memory"));
  buffers_.emplace(next_number_, Buffer{.memory = comm::SharedMemory::create(*group_, bytes)});
  return next_number_++;
}

void SharedRowPool::let_go(std::int64_t number) {
  Buffer& buffer = buffers_.at(number);
  buffer.in_use = false;
  buffer.begun_before = meetings_begun_;
}

RowMeeting SharedRowPool::meet(std::span<const SharedRows> rows) {
  COLLEGIUM_CHECK(!rows.empty(), "a meeting about nothing, in which ranks would not wait for each other");
  const auto count = static_cast<std::int64_t>(rows.size());
  RowMeeting meeting;
  meeting.pool_ = shared_from_this();
  meeting.number_ = meetings_begun_++;
  meeting.buffers_1X_ = at::empty({1, count}, at::kLong);
  meeting.buffers_YX_ = at::empty({group_->size(), count}, at::kLong);
  std::transform(rows.begin(), rows.end(), meeting.buffers_1X_.mutable_data_ptr<std::int64_t>(),
                 [](const SharedRows& one) { return one.buffer; });
  meeting.work_ = group_->all_gather(meeting.buffers_1X_, meeting.buffers_YX_);
  return meeting;
}

void RowMeeting::wait() {
  work_.wait();
  COLLEGIUM_CHECK(
      at::equal(buffers_YX_, buffers_1X_.expand_as(buffers_YX_)),
      "ranks of group '{}' do not share the same memory: they took or let go of rows in another order",
      pool_->group_->name());
  pool_->meetings_over_ = std::max(pool_->meetings_over_, number_ + 1);
}

}  // namespace collegium::moe
