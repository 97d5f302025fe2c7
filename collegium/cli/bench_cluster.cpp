// SPDX-License-Identifier: Apache-2.0
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/zeros.h>
#include <fmt/format.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <array>
#include <cmath>
#include <filesystem>
#include <map>

#include "collegium/base/error.h"
#include "collegium/base/file.h"
#include "collegium/base/machine.h"
#include "collegium/base/units.h"
#include "collegium/cli/bench.h"
#include "collegium/cli/bench_step.h"
#include "collegium/cli/launch.h"
#include "collegium/cli/progress.h"
#include "collegium/model/causal_attention.h"
#include "collegium/model/norm.h"
#include "collegium/model/rotary.h"
#include "collegium/ops/arena.h"
#include "collegium/ops/product.h"
#include "collegium/ops/swiglu.h"
#include "collegium/optim/adamw.h"
#include "collegium/plan/cluster.h"

namespace collegium::cli {

namespace {

struct ClusterBenchOptions {
  std::string file;
  double seconds = 0.1;
  LaunchOptions launch;
};

constexpr std::int64_t kAttentionLength = 512;
constexpr double kMicro = 1e-6;

/// Seconds of a FLOP against one size of a product: intercept and slope over 1/size.
struct Line {
  double intercept = 0.0;
  double slope = 0.0;
};

// Least squares of relative errors, so that slow small products do not decide alone.
Line fit(const std::vector<double>& x, const std::vector<double>& y) {
  double w = 0.0, wx = 0.0, wy = 0.0, wxx = 0.0, wxy = 0.0;
  for (std::size_t i = 0; i < x.size(); ++i) {
    const double weight = 1.0 / (y[i] * y[i]);
    w += weight;
    wx += weight * x[i];
    wy += weight * y[i];
    wxx += weight * x[i] * x[i];
    wxy += weight * x[i] * y[i];
  }
  const double slope = (w * wxy - wx * wy) / (w * wxx - wx * wx);
  return {.intercept = (wy - slope * wx) / w, .slope = slope};
}

/// What one rank reaches while all of them work. Collective: every rank makes the same measurements.
class ClusterBench {
 public:
  ClusterBench(comm::Communicator& world, double seconds) : world_(world), seconds_(seconds) {}

  // Everything is measured twice and the better figure stays: a machine that was disturbed for a second must
  // not look slow in what was measured then.
  plan::Cluster measure(const std::string& name) {
    group_by_node();
    measure_once(name);
    next_ = 0;
    const plan::Cluster cluster = measure_once(name);
    progress_.finish();
    return cluster;
  }

 private:
  plan::Cluster measure_once(const std::string& name) {
    const at::NoGradGuard no_grad;
    plan::Cluster c;
    c.name = name;
    c.note = fmt::format("measured by collegium bench cluster: {} ranks, {} threads each, all working",
                         world_.size(), at::get_num_threads());
    c.node_size = c.fast_domain = ranks_of_node_;
    c.cores_per_rank = at::get_num_threads();
    c.accelerator = measure_rank();
    // A link that no rank of the run uses is as fast as the memory that carries it.
    const plan::Link unused{.gb_per_s = c.accelerator.memory_gb_per_s / 2.0,
                            .latency_us = 1.0,
                            .efficiency = 1.0,
                            .all_to_all_gb_per_s = 0.0,
                            .all_to_all_latency_us = 0.0};
    c.fast_link = node_->size() > 1 ? measure_link(*node_, "within a node") : unused;
    c.slow_link = across_->size() > 1 ? measure_link(*across_, "between nodes") : c.fast_link;
    return c;
  }

  void show(const std::string& what) {
    if (world_.rank() == 0) progress_.show(what, true);
  }
  double time(const std::function<void()>& run) {
    std::int64_t runs = 0;
    const double median = time_runs(world_, seconds_, runs, run).median;
    if (next_ == best_.size()) best_.push_back(median);
    best_[next_] = std::min(best_[next_], median);
    return best_[next_++];
  }

  // The ranks of this rank's node, and those with its place in their nodes: they work at the same time.
  void group_by_node() {
    std::map<int, int> ranks_of_nodes;
    int place = 0;
    const int own = world_.node(world_.rank());
    for (int rank = 0; rank < world_.size(); ++rank) {
      if (rank == world_.rank()) place = ranks_of_nodes[own];
      ++ranks_of_nodes[world_.node(rank)];
    }
    ranks_of_node_ = ranks_of_nodes.begin()->second;
    for (const auto& [node, ranks] : ranks_of_nodes) {
      require_config(ranks == ranks_of_node_,
                     "bench cluster: node {} has {} ranks and node {} has {}; every node must have as many",
                     ranks_of_nodes.begin()->first, ranks_of_node_, node, ranks);
    }
    node_ = world_.split(own, world_.rank(), "node");
    across_ = world_.split(place, world_.rank(), "across");
  }

  plan::Accelerator measure_rank() {
    plan::Accelerator a;
    a.name = fmt::format("CPU, {} thread{}", at::get_num_threads(), at::get_num_threads() == 1 ? "" : "s");
    a.gemm_efficiency = 1.0;
    const bool threads = ranks_share_a_process(world_);
    a.memory_gib = machine_memory_bytes() / ranks_of_node_ / kGiB;
    show("a small operation");
    a.launch_us = launch_seconds() / kMicro;
    show("copies in memory");
    const double copied = copy_rate();
    a.memory_gb_per_s = copied / kGiga;
    show("row kernels");
    a.memory_efficiency = std::min(1.0, row_kernel_rate() / copied);
    show("the optimizer");
    a.optimizer_efficiency = std::min(1.0, optimizer_rate() / copied);
    measure_products("bf16", at::kBFloat16, a);
    measure_products("fp32", at::kFloat, a);
    show("attention");
    const auto [forward, backward] = attention_rates();
    const double peak = a.peak_tflops.at("bf16") * 1e12;
    a.attention_forward = forward / peak;
    a.attention_backward = backward / peak;
    a.attention_length = static_cast<double>(kAttentionLength);
    const double program = resident_bytes() - static_cast<double>(ops::arena_statistics().touched_bytes);
    a.workspace_gib = max_over_ranks(world_, {program})[0] / (threads ? world_.size() : 1) / kGiB;
    return a;
  }

  double launch_seconds() {
    constexpr int kCalls = 1000;
    at::Tensor one = at::zeros({1}, at::kFloat);
    return time([&] {
             for (int i = 0; i < kCalls; ++i) one.add_(1.0);
           }) /
           kCalls;
  }

  // Bytes read and written, of buffers that no cache holds.
  double copy_rate() {
    constexpr std::int64_t kBytes = std::int64_t{64} << 20;
    const at::Tensor from = at::zeros({kBytes}, at::kByte);
    at::Tensor to = at::zeros({kBytes}, at::kByte);
    return 2.0 * static_cast<double>(kBytes) / time([&] { to.copy_(from); });
  }

  // The same of row kernels, which compute on what they read: those of a block, on the bytes that the planner
  // books for them.
  double row_kernel_rate() {
    constexpr std::int64_t kRows = 8192;
    constexpr std::int64_t kWidth = 512;
    constexpr std::int64_t kHeadDim = 64;
    constexpr double kEpsilon = 1e-5;
    constexpr double kTheta = 10000.0;
    const at::Tensor x = at::full({kRows, kWidth}, 1.0, at::kBFloat16);
    const at::Tensor other = at::full_like(x, 1.0);
    const at::Tensor gate_up = at::full({kRows, 2 * kWidth}, 1.0, at::kBFloat16);
    const at::Tensor weight = at::full({kWidth}, 1.0, at::kBFloat16);
    const at::Tensor heads = x.view({1, kRows, kWidth / kHeadDim, kHeadDim});
    const model::RotaryTables tables = model::rotary_tables(0, kRows, kHeadDim, kTheta, at::kBFloat16);
    const double seconds = time([&] {
      model::rms_norm(x, weight, kEpsilon);
      model::apply_rotary(heads, tables);
      ops::swiglu(gate_up, {});
      x.add(other);
    });
    constexpr double kBytes = 4.0 + 4.0 + 6.0 + 6.0;
    return kBytes * kRows * kWidth / seconds;
  }

  // Gradients read twice and cleared, masters and moments read and written, weights written.
  double optimizer_rate() {
    constexpr std::int64_t kValues = std::int64_t{1} << 22;
    constexpr double kBytes = 2.0 * 4.0 + 2.0 * 12.0 + 2.0;
    constexpr double kRate = 1e-3;
    const auto zeros = [](at::ScalarType dtype) { return at::zeros({kValues}, dtype); };
    optim::Slot slot;
    slot.name = "measured";
    slot.value = zeros(at::kBFloat16);
    for (at::Tensor* state : {&slot.master, &slot.gradient, &slot.first_moment, &slot.second_moment})
      *state = zeros(at::kFloat);
    std::vector<optim::Slot> slots = {slot};
    return kBytes * kValues / time([&] {
             optim::gradient_squares(slots);
             optim::adamw_step({}, kRate, 1.0, 1, slots);
           });
  }

  // Training multiplies rows by a weight as it lies (input gradients), by its transpose (forward) and by the
  // transpose of rows (weight gradients), as often each.
  double product_seconds(at::ScalarType dtype, std::array<std::int64_t, 3> size) {
    constexpr double kValue = 0.01;
    constexpr double kLayouts = 3.0;
    const at::Tensor a = at::full({size[0], size[2]}, kValue, dtype);
    const at::Tensor b = at::full({size[2], size[1]}, kValue, dtype);
    const at::Tensor turned_a = at::full({size[2], size[0]}, kValue, dtype).t();
    const at::Tensor turned_b = at::full({size[1], size[2]}, kValue, dtype).t();
    return (time([&] { ops::product(a, b); }) + time([&] { ops::product(a, turned_b); }) +
            time([&] { ops::product(turned_a, b); })) /
           kLayouts;
  }

  // Rate = peak * product over rows, columns and depth of x/(x + x0): seconds of a FLOP are linear in 1/x.
  void measure_products(const std::string& format, at::ScalarType dtype, plan::Accelerator& a) {
    constexpr std::int64_t kOthers = 512;
    constexpr std::array<std::int64_t, 5> kSizes = {32, 64, 256, 1024, 4096};
    std::array<double, 3> half{};
    Line line;
    double of_line = 0.0;
    for (std::size_t axis = 0; axis < half.size(); ++axis) {
      std::vector<double> x;
      std::vector<double> y;
      for (const std::int64_t size : kSizes) {
        std::array<std::int64_t, 3> shape = {kOthers, kOthers, kOthers};
        shape.at(axis) = size;
        show(fmt::format("products in {}: {} x {} x {}", format, shape[0], shape[1], shape[2]));
        const double flops = 2.0 * static_cast<double>(shape[0] * shape[1] * shape[2]);
        const double seconds = product_seconds(dtype, shape);
        x.push_back(1.0 / static_cast<double>(size));
        y.push_back(std::max(0.1 * seconds, seconds - a.launch_us * kMicro) / flops);
      }
      line = fit(x, y);
      half.at(axis) = std::max(0.0, line.slope / line.intercept);
      of_line += (line.intercept + line.slope / kOthers) / static_cast<double>(half.size());
    }
    double reached = 1.0;
    for (const double x0 : half) reached *= kOthers / (kOthers + x0);
    a.peak_tflops[format] = 1e-12 / (of_line * reached);
    a.gemm_falloff[format] = {.rows = half[0], .columns = half[1], .depth = half[2]};
  }

  // FLOP/s of the two products of causal scores, and of the five of their backward pass.
  std::pair<double, double> attention_rates() {
    constexpr std::int64_t kSequences = 4;
    constexpr std::int64_t kHeads = 4;
    constexpr std::int64_t kLength = kAttentionLength;
    constexpr std::int64_t kHeadDim = 64;
    constexpr double kValue = 0.01;
    const at::Tensor q =
        at::full({kSequences, kHeads, kLength, kHeadDim}, kValue, at::kBFloat16).requires_grad_();
    const at::Tensor k = at::full_like(q, kValue).requires_grad_();
    const at::Tensor v = at::full_like(q, kValue).requires_grad_();
    const at::Tensor ones = at::full_like(q, 1.0);
    const double forward_s = time([&] { model::causal_attention(q, k, v); });
    const double both_s = time([&] {
      const at::AutoGradMode grad(true);
      model::causal_attention(q, k, v).backward(ones);
    });
    const double flops =
        4.0 * kSequences * kHeads * kLength * kHeadDim * static_cast<double>(kLength + 1) / 2.0;
    constexpr double kBackwardProducts = 2.5;
    return {flops / forward_s, kBackwardProducts * flops / std::max(0.1 * both_s, both_s - forward_s)};
  }

  plan::Link measure_link(comm::Communicator& group, const std::string& where) {
    constexpr std::int64_t kSmall = 1024;  // floats
    constexpr std::int64_t kLarge = std::int64_t{1} << 20;
    const auto size = static_cast<double>(group.size());
    const double sent = (size - 1.0) / size * 4.0 * static_cast<double>(kLarge - kSmall);
    const std::int64_t rank_part = group.size();
    const auto buffer = [&](std::int64_t floats) {
      return at::zeros({floats / rank_part * rank_part}, at::kFloat);
    };
    const auto reduce_s = [&](std::int64_t floats) {
      const at::Tensor all = buffer(floats);
      return time([&] { group.all_reduce(all).wait(); });
    };
    const auto exchange_s = [&](std::int64_t floats) {
      const at::Tensor from = buffer(floats);
      const at::Tensor to = buffer(floats);
      return time([&] { group.all_to_all(from, to).wait(); });
    };
    show(fmt::format("all_reduce {}", where));
    const double reduce_small = reduce_s(kSmall);
    const double reduce_large = reduce_s(kLarge);
    show(fmt::format("all_to_all {}", where));
    const double exchange_small = exchange_s(kSmall);
    const double exchange_large = exchange_s(kLarge);
    plan::Link link;
    link.efficiency = 1.0;
    link.gb_per_s = 2.0 * sent / std::max(0.1 * reduce_large, reduce_large - reduce_small) / kGiga;
    // The planner books a reduction as two passes, each with a latency and 0.3 of one per further rank.
    link.latency_us = reduce_small / 2.0 / (1.0 + 0.3 * (size - 1.0)) / kMicro;
    link.all_to_all_gb_per_s = sent / std::max(0.1 * exchange_large, exchange_large - exchange_small) / kGiga;
    link.all_to_all_latency_us = exchange_small / kMicro;
    return link;
  }

  comm::Communicator& world_;
  double seconds_;
  std::shared_ptr<comm::Communicator> node_;
  std::shared_ptr<comm::Communicator> across_;
  int ranks_of_node_ = 0;
  std::vector<double> best_;  // of every figure, in the order they are measured in
  std::size_t next_ = 0;
  Progress progress_;
};

void run(const ClusterBenchOptions& options) {
  require_config(options.seconds > 0.0, "--seconds {}: must be positive", options.seconds);
  const std::filesystem::path file = options.file;
  require_config(file.extension() == ".toml", "--write {}: must end in .toml", options.file);
  require_folder_of(file, "--write");
  launch(options.launch, [&](const std::shared_ptr<comm::Communicator>& world) {
    plan::Cluster cluster = ClusterBench(*world, options.seconds).measure(file.stem().string());
    cluster.accelerator.step_efficiency = measure_step_efficiency(cluster, world);
    if (world->rank() != 0) return;
    const std::string text = plan::cluster_toml(cluster);
    plan::parse_cluster(text, options.file);
    write_file_atomically(file, text);
    fmt::print("{}\nwritten to {}\n", text, options.file);
  });
}

}  // namespace

void add_bench_cluster(CLI::App& bench) {
  auto options = std::make_shared<ClusterBenchOptions>();
  CLI::App* verb = bench.add_subcommand(
      "cluster", "This machine as the planner sees it, one rank's figures while all work, into a file");
  verb->add_option("--write", options->file, "the file (TOML), for `plan --cluster` and planner.cluster")
      ->required();
  verb->add_option("--seconds", options->seconds,
                   "take each figure for about this long, twice; a whole step takes three seconds more")
      ->capture_default_str();
  add_launch_options(*verb, options->launch);
  verb->footer(
      "Examples:\n"
      "  collegium bench cluster --write cluster.toml --ranks 2\n"
      "  collegium bench cluster --write slow.toml --emulate nodes=2x1,intra=3GB/s:20us,inter=500MB/s:100us\n"
      "  collegium plan --model config.json --cluster cluster.toml --gpus 2 --global-batch 8 --seq 512");
  verb->callback([options] { run(*options); });
}

}  // namespace collegium::cli
