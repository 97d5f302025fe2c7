// SPDX-License-Identifier: Apache-2.0
#pragma once

// What the benchmarks share: statistics over runs and ranks, the flags that lay work out over ranks, text.

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "collegium/cli/app.h"
#include "collegium/comm/communicator.h"
#include "collegium/parallel/options.h"

namespace collegium::cli {

void add_bench_layer(CLI::App& bench);
void add_bench_step(CLI::App& bench);
void add_bench_comm(CLI::App& bench);
void add_bench_cluster(CLI::App& bench);

using BenchClock = std::chrono::steady_clock;
inline double seconds_since(BenchClock::time_point start) {
  return std::chrono::duration<double>(BenchClock::now() - start).count();
}

struct Spread {
  double min = 0.0;
  double median = 0.0;
  double max = 0.0;
};
/// What     Of at least one value.
Spread spread_of(std::vector<double> values);
double mean_of(const std::vector<double>& values);

/// What     Element by element over the ranks.
/// Comm     one all_reduce.
std::vector<double> max_over_ranks(comm::Communicator& world, const std::vector<double>& values);
std::vector<double> sum_over_ranks(comm::Communicator& world, const std::vector<double>& values);
/// What     Peak resident memory of a rank, bytes: of the fullest process, of threads their process's equal
///          parts.
/// Comm     two all_reduces.
double peak_memory_of_a_rank(comm::Communicator& world, double own_bytes);
/// What     Of this process, bytes.
double peak_resident_bytes();
/// What     Of this process now, bytes.
double resident_bytes();
/// What     Whether the ranks are threads of one process.
/// Comm     one all_reduce.
bool ranks_share_a_process(comm::Communicator& world);
/// What     How often to repeat what takes rank 0 `once_s` to fill its budget; the same on all ranks.
std::int64_t agree_on_runs(comm::Communicator& world, double once_s, double budget_s, std::int64_t least);

/// What     The slowest rank's seconds of each of `runs` runs, as many as fill the budget; the ranks start
///          every run together.
Spread time_runs(comm::Communicator& world, double budget_s, std::int64_t& runs,
                 const std::function<void()>& run);

/// What     The GEMM peaks of all ranks, measured at the same time and added, FLOP/s. Where ranks share
///          cores, the mean rates.
/// Comm     one all_gather, one all_reduce.
double gemm_peak_of_all_ranks(comm::Communicator& world, at::ScalarType dtype);

/// How experts are reached. What is left at its default keeps the value of a run file.
struct LayoutFlags {
  std::int64_t ep = 0;
  std::string dispatcher;
  bool combine_fp32 = false;
  std::optional<std::int64_t> chunks;
  bool overlap = false;
};
void add_layout_options(CLI::App& verb, LayoutFlags& flags);
/// What     Puts the flags into `options`. --overlap switches on everything that can overlap, with two chunks
///          unless --chunks says otherwise.
/// Throws   ConfigError naming the flag; also for --combine-fp32 where it would change nothing, as with this
///          compute dtype.
void apply_layout(const LayoutFlags& flags, at::ScalarType dtype, parallel::ParallelOptions& options);
/// What     Whether its combine sends sums of several experts' rows, which may travel in fp32.
bool has_partial_sums(moe::DispatcherKind kind);
/// What     "uneven, 2 chunks, overlapped".
std::string describe_layout(const moe::DispatcherOptions& dispatcher, const moe::OverlapOptions& overlap);

/// What     "81.3 ms", with three digits from microseconds to seconds.
std::string format_seconds(double seconds);
/// What     "123.4 GFLOP/s".
std::string format_gflops(double flops_per_s);

}  // namespace collegium::cli
