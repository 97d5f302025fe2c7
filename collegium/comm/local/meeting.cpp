// SPDX-License-Identifier: Apache-2.0
#include "collegium/comm/local/meeting.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "collegium/comm/agreement.h"
#include "collegium/comm/bytes.h"
#include "collegium/comm/errors.h"
#include "collegium/comm/reduce.h"

namespace collegium::comm {

namespace {

// Below this the last rank to arrive moves everything itself: waking others costs more (a wake-up is some 50
// us, in which one core copies about this much).
constexpr std::int64_t kSmallBytes = std::int64_t{256} * 1024;
// Parts of an all_reduce: large enough that claiming one is free, small enough to share evenly.
constexpr std::int64_t kPartBytes = std::int64_t{128} * 1024;

std::int64_t sum_before(const std::vector<std::int64_t>& rows, std::size_t end) {
  return std::accumulate(rows.begin(), rows.begin() + static_cast<std::ptrdiff_t>(end), std::int64_t{0});
}

std::int64_t output_bytes(const Call& call) {
  return call.output.defined() ? call.output.numel() * call.output.element_size() : 0;
}

}  // namespace

Meeting::Meeting(std::vector<int> ranks)
    : ranks_(std::move(ranks)), calls_(ranks_.size()), posted_(ranks_.size()) {}

bool Meeting::post(std::size_t place, Call call, const Group& group) {
  std::unique_lock lock(mutex_);
  calls_[place] = std::move(call);
  posted_[place] = Clock::now();
  if (++num_posted_ < ranks_.size()) return false;
  ready_at_ = began_ = posted_[place];
  std::vector<const Call*> calls;
  for (const Call& posted : calls_) calls.push_back(&posted);
  disagreement_ = find_disagreement(group, ranks_, calls);
  if (!disagreement_) make_parts();
  ready_ = true;
  std::int64_t bytes = 0;
  for (const Call& posted : calls_) bytes += output_bytes(posted);
  const bool small = bytes <= kSmallBytes;
  if (small && !disagreement_) {
    for (const Part& part : parts_) do_part(part);
    next_part_ = parts_.size();
    done_ = true;
    finished_ = Clock::now();
  }
  lock.unlock();
  changed_.notify_all();
  return true;
}

bool Meeting::wait_until(Clock::time_point deadline) {
  std::unique_lock lock(mutex_);
  const auto may_go_on = [this] { return ready_ || failure_ != nullptr; };
  if (!changed_.wait_until(lock, deadline, may_go_on)) return false;
  throw_if_broken();
  if (!done_) {
    lock.unlock();
    do_parts();
    lock.lock();
  }
  // What is left is being copied by other ranks at this moment: nobody who could be missing is waited for.
  changed_.wait(lock, [this] { return done_; });
  return true;
}

void Meeting::throw_if_broken() const {
  if (disagreement_) throw CommError(*disagreement_);
  if (failure_ && !ready_) std::rethrow_exception(failure_);
}

void Meeting::fail(std::exception_ptr error) {
  {
    const std::lock_guard lock(mutex_);
    if (!failure_) failure_ = std::move(error);
  }
  changed_.notify_all();
}

bool Meeting::done() {
  std::unique_lock lock(mutex_);
  if (done_ || disagreement_ || (failure_ && !ready_)) return true;
  if (!ready_) return false;
  // Somebody who only asks must come to an end too: no other rank may be in wait().
  lock.unlock();
  do_parts();
  lock.lock();
  return done_;
}

Timeline Meeting::timeline(std::size_t place) const {
  const std::lock_guard lock(mutex_);
  return {.posted = posted_[place], .ready = ready_at_, .began = began_, .done = finished_};
}

std::vector<int> Meeting::missing_ranks() const {
  const std::lock_guard lock(mutex_);
  std::vector<int> missing;
  for (std::size_t place = 0; place < ranks_.size(); ++place) {
    if (posted_[place] == Clock::time_point{}) missing.push_back(ranks_[place]);
  }
  return missing;
}

void Meeting::release(std::size_t place) {
  const std::lock_guard lock(mutex_);
  calls_[place].input = at::Tensor();
  calls_[place].output = at::Tensor();
}

void Meeting::make_parts() {
  const Call& first = calls_[0];
  switch (first.operation) {
    case Operation::kAllReduce: {
      const std::int64_t length = std::max<std::int64_t>(1, kPartBytes / first.row_bytes());
      for (std::int64_t begin = 0; begin < first.elements; begin += length)
        parts_.push_back({.target = 0, .begin = begin, .length = std::min(length, first.elements - begin)});
      break;
    }
    case Operation::kSend:
      parts_.push_back({.target = 1});
      break;
    case Operation::kBarrier:
      break;
    default:
      for (int place = 0; place < static_cast<int>(ranks_.size()); ++place)
        parts_.push_back({.target = place});
  }
  done_ = parts_.empty();
  if (done_) finished_ = Clock::now();
}

void Meeting::do_parts() {
  std::size_t did = 0;
  for (std::size_t i = next_part_.fetch_add(1); i < parts_.size(); i = next_part_.fetch_add(1)) {
    if (i == 0) {
      const std::lock_guard lock(mutex_);
      began_ = Clock::now();
    }
    do_part(parts_[i]);
    ++did;
  }
  if (did == 0) return;
  const std::lock_guard lock(mutex_);
  parts_done_ += did;
  if (parts_done_ < parts_.size()) return;
  done_ = true;
  finished_ = Clock::now();
  changed_.notify_all();
}

void Meeting::do_part(const Part& part) {
  const auto target = static_cast<std::size_t>(part.target);
  switch (calls_[0].operation) {
    case Operation::kAllReduce: {
      std::vector<const void*> inputs;
      std::vector<void*> outputs;
      for (const Call& call : calls_) {
        outputs.push_back(bytes_of(call.output) + part.begin * call.row_bytes());
        inputs.push_back(outputs.back());
      }
      reduce_elements(inputs, outputs, part.length, calls_[0].dtype, calls_[0].reduce);
      break;
    }
    case Operation::kAllGather:
      fill_all_gather(target);
      break;
    case Operation::kReduceScatter:
      fill_reduce_scatter(target);
      break;
    case Operation::kAllToAll:
      fill_all_to_all(target);
      break;
    case Operation::kBroadcast: {
      const auto root = static_cast<std::size_t>(calls_[0].peer);
      if (target != root)
        copy_bytes(bytes_of(calls_[target].output), bytes_of(calls_[root].input),
                   output_bytes(calls_[target]));
      break;
    }
    case Operation::kSend:
      copy_bytes(bytes_of(calls_[1].output), bytes_of(calls_[0].input), output_bytes(calls_[1]));
      break;
    case Operation::kRecv:
    case Operation::kBarrier:
      break;
  }
}

void Meeting::fill_all_gather(std::size_t target) {
  const Call& call = calls_[target];
  char* to = bytes_of(call.output);
  for (std::size_t from = 0; from < calls_.size(); ++from) {
    const std::int64_t bytes = call.recv_rows[from] * call.row_bytes();
    copy_bytes(to, bytes_of(calls_[from].input), bytes);
    to += bytes;
  }
}

void Meeting::fill_all_to_all(std::size_t target) {
  const Call& call = calls_[target];
  const std::int64_t row_bytes = call.row_bytes();
  for (std::size_t from = 0; from < calls_.size(); ++from) {
    const std::vector<Piece> sources = pieces_to(calls_[from], static_cast<int>(target));
    const std::vector<Piece> places = pieces_from(call, static_cast<int>(from));
    for (std::size_t i = 0; i < places.size(); ++i) {
      copy_bytes(bytes_of(call.output) + places[i].begin * row_bytes,
                 bytes_of(calls_[from].input) + sources[i].begin * row_bytes, places[i].rows * row_bytes);
    }
  }
}

void Meeting::fill_reduce_scatter(std::size_t target) {
  const Call& call = calls_[target];
  const std::int64_t offset = sum_before(call.send_rows, target) * call.row_bytes();
  std::vector<const void*> inputs;
  for (const Call& from : calls_) inputs.push_back(bytes_of(from.input) + offset);
  const std::vector<void*> outputs = {bytes_of(call.output)};
  reduce_elements(inputs, outputs, call.output.numel(), call.dtype, call.reduce);
}

}  // namespace collegium::comm
