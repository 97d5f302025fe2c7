// SPDX-License-Identifier: Apache-2.0
#pragma once

// One MoE layer, forward and backward, through the functions that `train` runs.

#include <array>
#include <cstdint>
#include <memory>
#include <string>

#include "collegium/cli/bench.h"
#include "collegium/cli/bench_traffic.h"
#include "collegium/cli/launch.h"
#include "collegium/moe/skews.h"
#include "collegium/moe/stage_times.h"

namespace collegium::cli {

/// Who chooses the experts.
enum class BenchRouting {
  kForced,  ///< a skew of moe/skews.h
  kRandom,  ///< every set of K experts is equally likely
  kLearned  ///< the router, with random weights
};

struct LayerBenchOptions {
  std::int64_t tokens = 4096;  ///< of all ranks together
  std::int64_t hidden = 512;
  std::int64_t ffn = 896;
  std::int64_t experts = 8;
  std::int64_t top_k = 2;
  std::string dtype = "bfloat16";
  std::string routing_name = "forced";
  std::string skew_name = "W0";
  double seconds = 3.0;
  LayoutFlags layout;
  LaunchOptions launch;
  bool json = false;

  BenchRouting routing = BenchRouting::kForced;  ///< from routing_name, by validate()
  moe::Skew skew = moe::Skew::kBalanced;         ///< from skew_name
  parallel::ParallelOptions parallel;            ///< from layout
};

/// What     Checks every rule and fills what follows from names and flags.
/// Throws   ConfigError naming the flag, its value and the rule.
void validate(LayerBenchOptions& options);

/// Times are of the slowest rank, run by run; stages and communication are means over runs and ranks; bytes
/// are of the last run, all ranks together.
struct LayerBenchResult {
  int ranks = 1;
  int ep = 1;
  moe::DispatcherOptions dispatcher;  ///< that was used
  int nodes = 1;                      ///< of an expert-parallel group
  int threads_per_rank = 1;
  std::int64_t runs = 0;
  Spread seconds;
  double flops = 0.0;  ///< useful ones of one run
  Spread floor_seconds;
  bool floor_across = false;  ///< the better schedule ran experts across threads
  double gemm_peak_flops_per_s = 0.0;
  std::array<double, moe::kStageNames.size()> stage_seconds{};
  LayerBytes counted;
  LayerBytes expected;
  ArrowBytes plan;
  double communication_s = 0.0;
  double communication_hidden_s = 0.0;
  double all_to_all_s = 0.0;
  double all_to_all_hidden_s = 0.0;
  double rows_max_over_mean = 1.0;      ///< of the ranks' rows
  std::int64_t remote_copies = 0;       ///< sum over tokens of the other nodes with any of their experts
  double expected_remote_copies = 0.0;  ///< its expectation for random routing

  double floor_fraction() const { return seconds.min > 0.0 ? floor_seconds.min / seconds.min : 0.0; }
};

/// What     Measures on all ranks.
/// Comm     collective over `world`.
/// Returns  complete on rank 0.
/// Throws   Error when a rank has sent other bytes than the routing asks for, naming rank, arrow and numbers.
LayerBenchResult run_layer_bench(const LayerBenchOptions& options,
                                 const std::shared_ptr<comm::Communicator>& world);

}  // namespace collegium::cli

namespace collegium {
template <>
struct EnumNames<cli::BenchRouting> {
  static constexpr std::pair<std::string_view, cli::BenchRouting> names[] = {
      {"forced", cli::BenchRouting::kForced},
      {"random", cli::BenchRouting::kRandom},
      {"learned", cli::BenchRouting::kLearned}};
};
}  // namespace collegium
