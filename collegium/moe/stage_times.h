// SPDX-License-Identifier: Apache-2.0
#pragma once

// Where the time of a layer's forward and backward pass goes, for benchmarks.

#include <array>
#include <chrono>
#include <cstddef>
#include <string_view>
#include <utility>

namespace collegium::moe {

/// In the order in which they run, one chunk's after the other's. A stage that waits for rows counts the
/// wait.
enum class Stage : std::size_t {
  kRouter,
  kPlan,
  kDispatch,
  kSharedExpert,
  kExperts,
  kCombine,
  kSharedExpertBackward,
  kCombineBackward,
  kExpertRowsBackward,
  kDispatchBackward,
  kExpertWeightsBackward,
  kRouterBackward
};

inline constexpr std::array<std::pair<Stage, std::string_view>, 12> kStageNames = {{
    {Stage::kRouter, "router"},
    {Stage::kPlan, "plan"},
    {Stage::kDispatch, "dispatch"},
    {Stage::kSharedExpert, "shared_expert"},
    {Stage::kExperts, "experts"},
    {Stage::kCombine, "combine"},
    {Stage::kSharedExpertBackward, "shared_expert_backward"},
    {Stage::kCombineBackward, "combine_backward"},
    {Stage::kExpertRowsBackward, "expert_rows_backward"},
    {Stage::kDispatchBackward, "dispatch_backward"},
    {Stage::kExpertWeightsBackward, "expert_weights_backward"},
    {Stage::kRouterBackward, "router_backward"},
}};

/// Adds up stages. Each end() takes the time since the last begin() or end(), so the stages' sum is the
/// pass's time. Used by one thread at a time.
class StageTimes {
 public:
  void begin() { last_ = Clock::now(); }
  void end(Stage stage) {
    const auto now = Clock::now();
    seconds_[static_cast<std::size_t>(stage)] += std::chrono::duration<double>(now - last_).count();
    last_ = now;
  }
  double seconds(Stage stage) const { return seconds_[static_cast<std::size_t>(stage)]; }
  void clear() { seconds_ = {}; }

 private:
  using Clock = std::chrono::steady_clock;

  std::array<double, kStageNames.size()> seconds_{};
  Clock::time_point last_;
};

}  // namespace collegium::moe
