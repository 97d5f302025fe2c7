// SPDX-License-Identifier: Apache-2.0
#pragma once

// A whole training step through train::Trainer, on random tokens.

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "collegium/cli/bench.h"
#include "collegium/cli/launch.h"
#include "collegium/plan/own_run.h"
#include "collegium/train/run_config.h"

namespace collegium::cli {

struct StepBenchOptions {
  std::string run_file;
  std::vector<std::string> overrides;
  std::int64_t layers = 4;
  std::int64_t hidden = 512;
  std::int64_t ffn = 896;
  std::int64_t experts = 8;
  std::int64_t top_k = 2;
  std::int64_t heads = 8;
  std::int64_t vocab = 8192;
  std::int64_t sequences = 8;
  std::int64_t micro = 0;
  std::int64_t length = 512;
  std::string dtype = "bfloat16";
  bool recompute = false;
  std::string routing = "learned";
  double seconds = 10.0;
  LayoutFlags layout;
  LaunchOptions launch;
  bool json = false;
};

/// One phase of a step: bytes of all ranks, times of the mean rank.
struct PhaseSums {
  std::string name;
  double within_nodes = 0.0;
  double between_nodes = 0.0;
  double transfer_s = 0.0;
  double skew_s = 0.0;
  double waiting_s = 0.0;
};

/// Memory of one rank in bytes: tensors as counted, the program as measured in the fullest process (of ranks
/// that are threads, its equal parts).
struct StepMemory {
  double program =
      0.0;  ///< resident after the first step besides tensors: code, libraries, generated kernels
  plan::OwnTensors tensors;
  double tensors_peak = 0.0;     ///< measured: most that were in use at a time
  double tensors_touched = 0.0;  ///< measured: with what fragmentation adds
  double total() const { return program + tensors.total(); }
};

/// What     The run that the flags, or the run file among them, describe.
/// Throws   ConfigError naming the flag or field.
train::RunConfig step_bench_config(const StepBenchOptions& options);

/// Bytes and times of communication are means over steps; times also over ranks, bytes are of all ranks.
struct StepBenchResult {
  plan::OwnRun run;  ///< what was measured, as the planner describes it
  int ranks = 1;
  int ep = 1;
  moe::DispatcherOptions dispatcher;  ///< that was used
  int threads_per_rank = 1;
  std::int64_t parameters = 0;
  std::int64_t runs = 0;
  Spread seconds;  ///< of the slowest rank, step by step
  double mean_seconds = 0.0;
  double tokens = 0.0;  ///< of a step
  double flops = 0.0;   ///< useful ones of a step
  double gemm_peak_flops_per_s = 0.0;
  double bytes_within_nodes = 0.0;
  double bytes_between_nodes = 0.0;
  double all_to_all_s = 0.0;
  double all_to_all_exposed_s = 0.0;
  double hidden_share = 0.0;  ///< of all communication
  std::vector<PhaseSums> phases;
  double peak_rss_bytes = 0.0;  ///< of all processes
  StepMemory memory;
  double activations_counted = 0.0;  ///< bytes per token and layer, as the run has it
  /// The same, of a forward pass on the step's tokens, all ranks; none where it is too little to be told from
  /// what lies beside it.
  std::optional<double> activations_measured;
  double activations_recomputed = 0.0;  ///< counted, with every block recomputed
};

/// What     Writes a corpus of random tokens, and times steps for about `seconds`. The folder is removed
///          before that.
/// Comm     collective over `world`.
/// Returns  complete on rank 0.
StepBenchResult run_step_bench(train::RunConfig config, double seconds,
                               const std::shared_ptr<comm::Communicator>& world);

/// What     Share of the rate planned on this cluster that the computation of a whole step of a small model
///          reaches: what measured single operations leave out (waits at the end of parallel regions, small
///          operations, fresh memory, ranks that are late). 0 = unknown, and on ranks other than 0.
/// Comm     collective over `world`, whose ranks the cluster describes.
/// Throws   what run_step_bench() throws.
double measure_step_efficiency(const plan::Cluster& cluster,
                               const std::shared_ptr<comm::Communicator>& world);

}  // namespace collegium::cli
