// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <memory>

namespace collegium::comm {

using Clock = std::chrono::steady_clock;

/// An operation's course, as far as the backend knows it.
struct Timeline {
  Clock::time_point posted;  ///< by this rank
  Clock::time_point ready;   ///< the last rank it depends on had posted; MPI does not know: as `posted`
  Clock::time_point began;   ///< something moved; MPI and an emulated network: as `ready`
  Clock::time_point done;    ///< the result was there; MPI: the last look before one that found it there
};

/// One operation under way. Its tensors are kept alive by it and must be neither written nor (outputs) read
/// before wait() returns. Dropping a Work does not cancel the operation.
class [[nodiscard]] Work {
 public:
  /// What a backend or a decorator implements.
  class State {
   public:
    virtual ~State() = default;
    /// Returns when the result is there; a second call returns at once.
    virtual void wait() = 0;
    /// Whether wait() would return without blocking.
    virtual bool done() = 0;
    /// Valid after wait().
    virtual Timeline timeline() const = 0;
  };

  /// An operation that is already done.
  Work() = default;
  explicit Work(std::shared_ptr<State> state) : state_(std::move(state)) {}

  /// Blocks until outputs may be read and inputs written again.
  /// Throws   CommError: time-out (names the missing ranks), mismatch between ranks; PeerFailure: another
  ///          rank failed.
  void wait() {
    if (state_) state_->wait();
  }
  /// Whether wait() would return without blocking.
  bool done() { return !state_ || state_->done(); }
  /// Valid after wait(); all zero for a default-constructed Work.
  Timeline timeline() const { return state_ ? state_->timeline() : Timeline{}; }

 private:
  std::shared_ptr<State> state_;
};

}  // namespace collegium::comm
