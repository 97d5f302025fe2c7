// SPDX-License-Identifier: Apache-2.0
#include <ATen/Parallel.h>
#include <fmt/format.h>

#include <algorithm>
#include <filesystem>
#include <memory>
#include <utility>

#include "collegium/base/error.h"
#include "collegium/base/machine.h"
#include "collegium/base/rng.h"
#include "collegium/base/units.h"
#include "collegium/cli/bench_step.h"
#include "collegium/cli/progress.h"
#include "collegium/data/made_corpus.h"
#include "collegium/model/account.h"
#include "collegium/model/tensor_io.h"
#include "collegium/ops/arena.h"
#include "collegium/train/machine_folder.h"
#include "collegium/train/trainer.h"

namespace collegium::cli {

namespace {

namespace fs = std::filesystem;

constexpr std::int64_t kStepWarmUps = 1;
constexpr std::int64_t kLeastStepRuns = 3;
constexpr std::array kPhases = {"plan",   "dispatch", "combine", "combine backward", "dispatch backward",
                                "losses", "gradients"};

// Enough for some steps; an epoch after the other if there are more.
void write_random_corpus(const fs::path& folder, const train::RunConfig& config) {
  constexpr std::int64_t kSteps = 4;
  const double bytes = static_cast<double>(kSteps * sizeof(std::int64_t)) *
                       static_cast<double>(config.batch.global_batch) *
                       static_cast<double>(config.data.sequence_length + 1);
  require_config(bytes <= machine_memory_bytes(),
                 "bench step: {} sequences of {} tokens: {} steps of them take {}, this machine has {}",
                 config.batch.global_batch, config.data.sequence_length, kSteps, format_bytes(bytes),
                 format_bytes(machine_memory_bytes()));
  const std::int64_t count = kSteps * config.batch.global_batch * (config.data.sequence_length + 1);
  const RandomStream random(1, "bench/tokens");
  std::vector<std::int64_t> ids;
  ids.reserve(static_cast<std::size_t>(count));
  for (std::int64_t i = 0; i < count; ++i) {
    ids.push_back(static_cast<std::int64_t>(random.bits(static_cast<std::uint64_t>(i)) %
                                            static_cast<std::uint64_t>(config.model.vocab_size)));
  }
  data::prepare_made_corpus(folder, {{.name = "random", .ids = std::move(ids)}}, config.model.vocab_size,
                            0.05);
}

// Of all processes, which ranks that are threads share. Every rank has read `own` when one returns.
double over_processes(comm::Communicator& world, double own) {
  return ranks_share_a_process(world) ? max_over_ranks(world, {own})[0] : sum_over_ranks(world, {own})[0];
}

class StepBench {
 public:
  StepBench(const train::RunConfig& config, const std::shared_ptr<comm::Communicator>& world)
      : world_(world), config_(config), trainer_(config, world) {}

  StepBenchResult measure(double seconds) {
    const model::ModelConfig& model = trainer_.decoder().config();
    StepBenchResult r;
    r.run = trainer_.own_run();
    r.ranks = world_->size();
    r.ep = trainer_.groups().ep->size();
    r.dispatcher = trainer_.groups().dispatcher;
    r.threads_per_rank = at::get_num_threads();
    r.parameters = model::count_parameters(model).total;
    r.tokens = static_cast<double>(config_.batch.global_batch * config_.data.sequence_length);
    r.flops = r.tokens * model::training_flops_per_token(model, config_.data.sequence_length);
    r.gemm_peak_flops_per_s =
        gemm_peak_of_all_ranks(*world_, model::parse_dtype(config_.train.dtype, "train.dtype"));
    const auto start = BenchClock::now();
    for (std::int64_t i = 0; i < kStepWarmUps; ++i) one_step();
    r.runs = agree_on_runs(*world_, seconds_since(start) / static_cast<double>(kStepWarmUps), seconds,
                           kLeastStepRuns);
    count_memory(r);
    seconds_.clear();
    sums_.fill(0.0);
    phase_sums_.clear();
    Progress progress;
    for (std::int64_t i = 0; i < r.runs; ++i) {
      if (world_->rank() == 0) progress.show(fmt::format("step {} of {}", i + 1, r.runs));
      one_step();
    }
    progress.finish();
    summarize(r);
    return r;
  }

 private:
  void one_step() {
    world_->barrier();
    const auto start = BenchClock::now();
    const train::StepReport report = trainer_.step();
    seconds_.push_back(seconds_since(start));
    const train::CommReport& c = report.communication;
    const std::array<double, kSums> values = {static_cast<double>(c.bytes_within_nodes),
                                              static_cast<double>(c.bytes_between_nodes), c.all_to_all_s,
                                              c.all_to_all_exposed_s, c.hidden_share};
    for (std::size_t i = 0; i < kSums; ++i) sums_[i] += values[i];
    phase_sums_.resize(kPhases.size());
    for (std::size_t i = 0; i < kPhases.size(); ++i) {
      phase_sums_[i].name = kPhases[i];
      const comm::LedgerEntry entry =
          trainer_.groups().ledger->sum([&](const comm::LedgerKey& key) { return key.phase == kPhases[i]; });
      phase_sums_[i].within_nodes += static_cast<double>(entry.bytes_within_nodes);
      phase_sums_[i].between_nodes += static_cast<double>(entry.bytes_between_nodes);
      phase_sums_[i].transfer_s += entry.transfer_s;
      phase_sums_[i].skew_s += entry.skew_s;
      phase_sums_[i].waiting_s += entry.waiting_s;
    }
  }

  void count_memory(StepBenchResult& r) {
    const plan::OwnRun& run = r.run;
    const plan::OwnActivations bytes = plan::own_activations(run);
    const auto layers = static_cast<double>(run.model.layers);
    r.activations_recomputed = bytes.recomputed / layers;
    r.activations_counted = (run.recompute ? bytes.recomputed : bytes.layers) / layers;
    const double measured = (measure_activations() - bytes.outside) / layers;
    if (measured > 0.0) r.activations_measured = measured;
    const double program = resident_bytes() - static_cast<double>(ops::arena_statistics().touched_bytes);
    r.memory.program = peak_memory_of_a_rank(*world_, program);
    r.memory.tensors = plan::own_tensors(run);
  }

  // What the forward pass of the last step's first micro-step leaves behind per token, of the tensors that
  // come from the arena: bytes of all ranks over their tokens, as ranks that are threads share an arena. It
  // is read while every rank holds what its pass has left.
  double measure_activations() {
    const std::int64_t step = trainer_.state().step;
    const train::MicroBatch batch = trainer_.batches(step).micro_step(0);
    const model::ForwardOptions options = trainer_.forward_options(batch, 0, step);
    world_->barrier();
    const auto before = static_cast<double>(ops::arena_statistics().in_use_bytes);
    world_->barrier();
    const model::ForwardResult result = trainer_.decoder().forward(batch.ids_BS, options);
    world_->barrier();
    const double left = static_cast<double>(ops::arena_statistics().in_use_bytes) - before;
    return over_processes(*world_, left) /
           static_cast<double>(batch.all_sequences * config_.data.sequence_length);
  }

  void summarize(StepBenchResult& r) {
    const std::vector<double> seconds = max_over_ranks(*world_, seconds_);
    r.seconds = spread_of(seconds);
    r.mean_seconds = mean_of(seconds);
    const auto runs = static_cast<double>(r.runs);
    const double parts = runs * static_cast<double>(r.ranks);
    const std::vector<double> sums = sum_over_ranks(*world_, {sums_.begin(), sums_.end()});
    r.bytes_within_nodes = sums[0] / runs;
    r.bytes_between_nodes = sums[1] / runs;
    r.all_to_all_s = sums[2] / parts;
    r.all_to_all_exposed_s = sums[3] / parts;
    r.hidden_share = sums[4] / parts;
    for (const PhaseSums& own : phase_sums_) {
      const std::vector<double> all = sum_over_ranks(
          *world_, {own.within_nodes, own.between_nodes, own.transfer_s, own.skew_s, own.waiting_s});
      r.phases.push_back({.name = own.name,
                          .within_nodes = all[0] / runs,
                          .between_nodes = all[1] / runs,
                          .transfer_s = all[2] / parts,
                          .skew_s = all[3] / parts,
                          .waiting_s = all[4] / parts});
    }
    r.peak_rss_bytes = over_processes(*world_, peak_resident_bytes());
    const ops::ArenaStatistics arena = ops::arena_statistics();
    r.memory.tensors_peak = peak_memory_of_a_rank(*world_, static_cast<double>(arena.peak_bytes));
    r.memory.tensors_touched = peak_memory_of_a_rank(*world_, static_cast<double>(arena.touched_bytes));
  }

  static constexpr std::size_t kSums = 5;

  std::shared_ptr<comm::Communicator> world_;
  const train::RunConfig& config_;
  train::Trainer trainer_;
  std::vector<double> seconds_;
  std::array<double, kSums> sums_{};
  std::vector<PhaseSums> phase_sums_;
};

}  // namespace

StepBenchResult run_step_bench(train::RunConfig config, double seconds,
                               const std::shared_ptr<comm::Communicator>& world) {
  // The tokens are the same on all machines.
  auto folder = std::make_unique<train::MachineFolder>(
      world, "collegium-bench", [&](const fs::path& path) { write_random_corpus(path, config); });
  config.data.path = (folder->path() / "data").string();
  StepBench bench(config, world);
  // The ranks have mapped it: without its names, an interrupted measurement leaves nothing behind.
  world->barrier();
  folder.reset();
  return bench.measure(seconds);
}

}  // namespace collegium::cli
