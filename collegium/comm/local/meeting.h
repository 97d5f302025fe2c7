// SPDX-License-Identifier: Apache-2.0
#pragma once

// One operation for which ranks meet in shared memory.

#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "collegium/comm/call.h"
#include "collegium/comm/work.h"

namespace collegium::comm {

/// Calls come in by post(); when all are there they are compared, the work is cut into parts, and whoever
/// waits takes parts until none is left. The parts and their results do not depend on who does them.
class Meeting {
 public:
  /// `ranks` of the group take part: all of them, or the two of a send and a recv (sender first).
  explicit Meeting(std::vector<int> ranks);

  /// What     Adds the call of ranks[place] and, with the last one, makes the parts (and does them, if
  ///          small).
  /// Returns  Whether it was the last.
  bool post(std::size_t place, Call call, const Group& group);

  /// What     Waits for the others up to the deadline, doing parts meanwhile.
  /// Returns  false when the deadline passed.
  /// Throws   CommError on disagreement, and what fail() said.
  bool wait_until(Clock::time_point deadline);

  /// What     Ends all waits, present and future, with this error, unless all calls came in.
  void fail(std::exception_ptr error);

  /// What     Whether wait_until() would return at once. Moves what is there to be moved.
  bool done();
  Timeline timeline(std::size_t place) const;
  /// Places whose call is not there.
  std::vector<int> missing_ranks() const;
  /// What     Lets go of the tensors of ranks[place], once done.
  void release(std::size_t place);

 private:
  struct Part {
    int target = 0;                      // place whose output is filled
    std::int64_t begin = 0, length = 0;  // all_reduce: elements
  };

  void make_parts();
  void do_parts();
  void do_part(const Part& part);
  void fill_all_gather(std::size_t target);
  void fill_all_to_all(std::size_t target);
  void fill_reduce_scatter(std::size_t target);
  void throw_if_broken() const;

  const std::vector<int> ranks_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<Call> calls_;
  std::vector<Clock::time_point> posted_;  // epoch = not yet
  std::size_t num_posted_ = 0;
  std::vector<Part> parts_;
  std::atomic<std::size_t> next_part_{0};
  std::size_t parts_done_ = 0;
  bool ready_ = false;
  bool done_ = false;
  std::optional<std::string> disagreement_;
  std::exception_ptr failure_;
  Clock::time_point ready_at_;
  Clock::time_point began_;
  Clock::time_point finished_;
};

}  // namespace collegium::comm
