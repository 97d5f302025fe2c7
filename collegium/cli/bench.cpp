// SPDX-License-Identifier: Apache-2.0
#include "collegium/cli/bench.h"

#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/ones_like.h>
#include <fmt/format.h>
#include <sys/resource.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <fstream>
#include <functional>
#include <numeric>

#include "collegium/base/error.h"
#include "collegium/cli/verb.h"
#include "collegium/comm/seats.h"
#include "collegium/model/tensor_io.h"
#include "collegium/ops/gemm_peak.h"
#include "collegium/ops/product.h"
#include "collegium/ops/threads.h"

namespace collegium::cli {

namespace {

std::vector<double> reduce(comm::Communicator& world, const std::vector<double>& values, comm::ReduceOp op) {
  const at::Tensor all = at::empty({static_cast<std::int64_t>(values.size())}, at::kDouble);
  std::copy(values.begin(), values.end(), all.mutable_data_ptr<double>());
  world.all_reduce(all, op).wait();
  const auto* reduced = all.const_data_ptr<double>();
  return {reduced, reduced + values.size()};
}

// Of ranks that share cores: each one's best product may have had a core alone, so that bests do not add up.
double mean_gemm_rate(at::ScalarType dtype) {
  constexpr std::int64_t kSize = 512;
  constexpr double kFlops = 2.0 * kSize * kSize * kSize;
  constexpr double kBudgetSeconds = 0.25;
  const at::NoGradGuard no_grad;
  const at::Tensor a = at::ones({kSize, kSize}, ops::product_dtype(dtype));
  const at::Tensor b = at::ones_like(a);
  at::Tensor c = at::empty_like(a);
  const auto rate_of = [&](const auto& product) {
    const auto start = BenchClock::now();
    std::int64_t products = 0;
    for (; products == 0 || seconds_since(start) < kBudgetSeconds; ++products) product();
    return static_cast<double>(products) * kFlops / seconds_since(start);
  };
  const double atens = rate_of([&] { at::mm_out(c, a, b); });
  return std::max(atens, rate_of([&] { ops::product_into(a, b, c); }));
}

}  // namespace

Spread spread_of(std::vector<double> values) {
  COLLEGIUM_CHECK(!values.empty(), "no values");
  std::sort(values.begin(), values.end());
  const std::size_t middle = values.size() / 2;
  const double median = values.size() % 2 == 1 ? values[middle] : 0.5 * (values[middle - 1] + values[middle]);
  return {.min = values.front(), .median = median, .max = values.back()};
}

double mean_of(const std::vector<double>& values) {
  return std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
}

std::vector<double> max_over_ranks(comm::Communicator& world, const std::vector<double>& values) {
  return reduce(world, values, comm::ReduceOp::kMax);
}

std::vector<double> sum_over_ranks(comm::Communicator& world, const std::vector<double>& values) {
  return reduce(world, values, comm::ReduceOp::kSum);
}

double peak_resident_bytes() {
  constexpr double kKib = 1024.0;
  // What getrusage() says begins with the peak of the program that started this one.
  std::ifstream status("/proc/self/status");
  std::string word;
  while (status >> word) {
    double peak = 0.0;
    if (word == "VmHWM:" && status >> peak) return peak * kKib;
  }
  rusage usage{};
  ::getrusage(RUSAGE_SELF, &usage);
  return static_cast<double>(usage.ru_maxrss) * kKib;
}

double resident_bytes() {
  std::ifstream stat("/proc/self/statm");
  double all = 0.0;
  double resident = 0.0;
  stat >> all >> resident;
  return resident * static_cast<double>(::sysconf(_SC_PAGE_SIZE));
}

bool ranks_share_a_process(comm::Communicator& world) {
  const auto pid = static_cast<double>(::getpid());
  const std::vector<double> extremes = max_over_ranks(world, {pid, -pid});
  return extremes[0] == -extremes[1];
}

double peak_memory_of_a_rank(comm::Communicator& world, double own_bytes) {
  const double fullest = max_over_ranks(world, {own_bytes})[0];
  return fullest / (ranks_share_a_process(world) ? world.size() : 1);
}

std::int64_t agree_on_runs(comm::Communicator& world, double once_s, double budget_s, std::int64_t least) {
  constexpr double kMost = 10000.0;
  const double wanted = std::min(kMost, budget_s / std::max(once_s, 1e-9));
  const double own = world.rank() == 0 ? wanted : 0.0;
  return std::max<std::int64_t>(least, std::lround(max_over_ranks(world, {own})[0]));
}

Spread time_runs(comm::Communicator& world, double budget_s, std::int64_t& runs,
                 const std::function<void()>& run) {
  constexpr std::int64_t kLeastRuns = 5;
  run();
  const auto once = BenchClock::now();
  run();
  runs = agree_on_runs(world, seconds_since(once), budget_s, kLeastRuns);
  std::vector<double> seconds;
  for (std::int64_t i = 0; i < runs; ++i) {
    world.barrier();
    const auto start = BenchClock::now();
    run();
    seconds.push_back(seconds_since(start));
  }
  return spread_of(max_over_ranks(world, seconds));
}

namespace {

// Whether the threads of this machine's ranks are more than the cores that they may run on.
bool ranks_share_cores(comm::Communicator& world) {
  std::vector<int> cores;
  for (const ops::ThreadBinding& binding : ops::thread_bindings())
    cores.insert(cores.end(), binding.cores.begin(), binding.cores.end());
  const comm::Seats seats(world, cores);
  const auto ranks = static_cast<int>(seats.neighbours().size());
  return ranks * at::get_num_threads() > seats.num_cores();
}

}  // namespace

double gemm_peak_of_all_ranks(comm::Communicator& world, at::ScalarType dtype) {
  const bool shared = ranks_share_cores(world);
  return sum_over_ranks(world, {shared ? mean_gemm_rate(dtype) : ops::measure_gemm_peak(dtype)})[0];
}

void add_layout_options(CLI::App& verb, LayoutFlags& flags) {
  const auto group = [](CLI::Option* option) { option->group("Layout"); };
  group(verb.add_option("--ep", flags.ep,
                        "ranks that share the experts; 0 = the largest divisor of the ranks that does not "
                        "exceed the experts"));
  group(verb.add_option(
      "--dispatcher", flags.dispatcher,
      "auto (default: two_level where that is expected to halve what travels, else uneven), uneven, "
      "padded, allgather, two_level or shared_memory"));
  group(verb.add_flag("--combine-fp32", flags.combine_fp32,
                      "with --dispatcher two_level or allgather, in bfloat16: partial sums travel in fp32"));
  group(verb.add_option("--chunks", flags.chunks,
                        "cut the tokens into this many chunks; one travels while another is computed "
                        "(default 1)"));
  group(verb.add_flag("--overlap", flags.overlap,
                      "overlap all that can be: two chunks (or --chunks), weight and dense gradients"));
}

bool has_partial_sums(moe::DispatcherKind kind) {
  return kind == moe::DispatcherKind::kTwoLevel || kind == moe::DispatcherKind::kAllgather;
}

namespace {

void apply_combine_fp32(at::ScalarType dtype, parallel::DispatcherChoice& dispatcher) {
  require_config(dispatcher.kind && has_partial_sums(*dispatcher.kind),
                 "--combine-fp32: needs --dispatcher two_level or allgather, which send partial sums, not {}",
                 dispatcher.kind ? enum_name(*dispatcher.kind) : "auto");
  require_config(dtype == at::kBFloat16, "--combine-fp32: needs bfloat16; partial sums of {} are as wide",
                 model::dtype_name(dtype));
  dispatcher.combine_fp32 = true;
}

}  // namespace

void apply_layout(const LayoutFlags& flags, at::ScalarType dtype, parallel::ParallelOptions& options) {
  require_config(flags.ep >= 0, "--ep {}: must not be negative (0 = chosen)", flags.ep);
  const std::int64_t chunks = flags.chunks.value_or(options.overlap.chunks);
  require_config(chunks >= 1, "--chunks {}: must be at least 1", chunks);
  if (flags.ep > 0) options.ep = flags.ep;
  if (!flags.dispatcher.empty()) read_fields(Json(flags.dispatcher), "--dispatcher", options.dispatcher.kind);
  if (flags.combine_fp32) apply_combine_fp32(dtype, options.dispatcher);
  if (flags.overlap) {
    constexpr std::int64_t kChunks = 2;
    options.overlap = {
        .chunks = std::max(kChunks, options.overlap.chunks), .shared_expert = true, .weight_gradients = true};
    options.overlap_gradients = true;
  }
  if (flags.chunks) options.overlap.chunks = *flags.chunks;
}

std::string describe_layout(const moe::DispatcherOptions& dispatcher, const moe::OverlapOptions& overlap) {
  std::string text = enum_name(dispatcher.kind);
  if (dispatcher.combine_fp32 && has_partial_sums(dispatcher.kind)) text += ", partial sums in fp32";
  if (overlap.chunks > 1) text += fmt::format(", {} chunks", overlap.chunks);
  if (overlap.weight_gradients) text += ", overlapped";
  return text;
}

std::string format_seconds(double seconds) {
  constexpr double kMilli = 1e-3;
  constexpr double kMicro = 1e-6;
  const auto [value, unit] = seconds >= 1.0      ? std::pair{seconds, "s"}
                             : seconds >= kMilli ? std::pair{seconds / kMilli, "ms"}
                                                 : std::pair{seconds / kMicro, "us"};
  return fmt::format("{:.{}f} {}", value, value >= 100.0 ? 0 : value >= 10.0 ? 1 : 2, unit);
}

std::string format_gflops(double flops_per_s) { return fmt::format("{:.1f} GFLOP/s", flops_per_s / 1e9); }

void add_bench(CLI::App& app) {
  CLI::App* verb = app.add_subcommand(
      "bench",
      "Measure an MoE layer, a whole training step, the collectives or the machine, on one rank or many");
  verb->require_subcommand(1);
  add_bench_layer(*verb);
  add_bench_step(*verb);
  add_bench_comm(*verb);
  add_bench_cluster(*verb);
}

}  // namespace collegium::cli
