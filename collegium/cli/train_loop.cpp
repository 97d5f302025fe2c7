// SPDX-License-Identifier: Apache-2.0
#include "collegium/cli/train_loop.h"

#include <ATen/Parallel.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/tensor.h>
#include <fmt/format.h>

#include <algorithm>
#include <functional>
#include <limits>
#include <numeric>

#include "collegium/base/error.h"
#include "collegium/base/log.h"
#include "collegium/base/units.h"
#include "collegium/cli/bench.h"
#include "collegium/cli/progress.h"
#include "collegium/cli/signals.h"
#include "collegium/cli/train_sample.h"
#include "collegium/cli/train_start.h"
#include "collegium/model/account.h"
#include "collegium/model/tensor_io.h"
#include "collegium/ops/threads.h"
#include "collegium/train/metrics.h"
#include "collegium/train/trainer.h"

namespace collegium::cli {

namespace {

using Clock = BenchClock;

class Loop {
 public:
  Loop(const train::RunConfig& config, train::Trainer& trainer)
      : config_(config),
        trainer_(trainer),
        peak_flops_(gemm_peak_of_all_ranks(*trainer_.groups().world,
                                           model::parse_dtype(config_.train.dtype, "train.dtype"))),
        flops_per_token_(
            model::training_flops_per_token(trainer.decoder().config(), config.data.sequence_length)),
        start_(Clock::now()),
        first_step_(trainer.state().step),
        elapsed_before_(trainer.state().elapsed_seconds) {
    if (is_root()) metrics_.emplace(config.run_folder, trainer.state().step);
  }

  TrainSummary run() {
    TrainSummary summary;
    const std::int64_t num_steps = config_.train.steps;
    while (trainer_.state().step < num_steps && summary.stop == Stop::kNot) {
      one_step();
      const std::int64_t step = trainer_.state().step;
      if (step < num_steps && due(config_.validation.every_steps, step)) validate();
      if (step < num_steps && due(config_.checkpoint.every_steps, step)) save();
      if (step < num_steps) summary.stop = should_stop();
    }
    progress_.finish();
    summary.steps = trainer_.state().step;
    summary.seconds = seconds_since(start_);
    if (step_seconds_ > 0.0) {
      summary.tokens_per_s = tokens_ / step_seconds_;
      summary.share_of_gemm_peak = summary.tokens_per_s * flops_per_token_ / peak_flops_;
    }
    const auto latest = train::find_latest_checkpoint(config_.run_folder);
    const bool saved = latest && latest->filename() == fmt::format("step-{:08}", summary.steps);
    summary.checkpoint = any_rank(is_root() && saved) ? std::filesystem::path(config_.run_folder) /
                                                            fmt::format("step-{:08}", summary.steps)
                                                      : save();
    return summary;
  }

  train::ValidationResult validate() {
    const train::ValidationResult result = train::validate_model(
        trainer_.decoder(), trainer_.dataset(), train::validation_shape(config_), trainer_.groups());
    if (!is_root()) return result;
    metrics_->write(trainer_.state().step, result, trainer_.dataset().index().domains);
    progress_.finish();
    progress_.show(
        fmt::format("step {}: validation loss {:.4f} nats/token", trainer_.state().step, result.loss), true);
    progress_.finish();
    return result;
  }

  // Of all ranks, which therefore all come here.
  std::vector<train::PredictedFigure> compare() {
    if (later_seconds_.empty()) return {};
    comm::Communicator& world = *trainer_.groups().world;
    const double steps_s = std::accumulate(later_seconds_.begin(), later_seconds_.end(), 0.0);
    train::MeasuredRun run{.memory_bytes = peak_memory_of_a_rank(world, peak_bytes_),
                           .step_s = spread_of(later_seconds_).median,
                           .all_to_all_share = least_all_to_all_s() / steps_s,
                           .traffic = *traffic_};
    std::vector<double> sums;
    for (std::size_t arrow = 0; arrow < traffic_->measured.size(); ++arrow) {
      for (const plan::ArrowBytes* bytes : {&traffic_->predicted, &traffic_->measured}) {
        sums.push_back(bytes->at(arrow).within_nodes);
        sums.push_back(bytes->at(arrow).between_nodes);
      }
    }
    sums = sum_over_ranks(world, sums);
    auto next = sums.begin();
    for (std::size_t arrow = 0; arrow < traffic_->measured.size(); ++arrow) {
      for (plan::ArrowBytes* bytes : {&run.traffic.predicted, &run.traffic.measured}) {
        bytes->at(arrow) = {.within_nodes = next[0], .between_nodes = next[1]};
        next += 2;
      }
    }
    const std::vector<train::PredictedFigure> figures = train::compare_run(config_, trainer_.own_run(), run);
    if (is_root()) metrics_->write(trainer_.state().step, figures);
    return figures;
  }

 private:
  // In every step of the rank that waited least for others there: over MPI waiting cannot be told from
  // sending.
  double least_all_to_all_s() const {
    std::vector<double> negative;
    for (const double seconds : later_all_to_all_) negative.push_back(-seconds);
    const std::vector<double> least = max_over_ranks(*trainer_.groups().world, negative);
    return std::accumulate(least.begin(), least.end(), 0.0, std::minus<>());
  }
  static bool due(std::int64_t every, std::int64_t step) { return every > 0 && step % every == 0; }

  bool is_root() const { return trainer_.groups().is_root(); }

  // The same answer on all ranks.
  bool any_rank(bool here) const {
    const at::Tensor flag = at::scalar_tensor(here ? 1 : 0, at::kLong);
    trainer_.groups().world->all_reduce(flag, comm::ReduceOp::kMax).wait();
    return flag.item<std::int64_t>() != 0;
  }

  // The same answer on all ranks: a signal to any of them, else that any of them sees the time as up.
  Stop should_stop() const {
    const at::Tensor reasons =
        at::tensor({stop_requested() ? 1 : 0, seconds_left() <= 0.0 ? 1 : 0}, at::kLong);
    trainer_.groups().world->all_reduce(reasons, comm::ReduceOp::kMax).wait();
    if (reasons[0].item<std::int64_t>() != 0) return Stop::kSignal;
    return reasons[1].item<std::int64_t>() != 0 ? Stop::kTime : Stop::kNot;
  }

  double seconds_left() const {
    if (config_.train.max_minutes == 0.0) return std::numeric_limits<double>::infinity();
    return config_.train.max_minutes * 60.0 - seconds_since(start_);
  }

  std::filesystem::path save() { return trainer_.save(elapsed_before_ + seconds_since(start_)); }

  // The first step also finds the memory for the others, and gathers its routing.
  void one_step() {
    const bool first = !traffic_.has_value();
    if (first) trainer_.audit_next_step();
    const auto begin = Clock::now();
    const train::StepReport report = trainer_.step();
    if (first) {
      traffic_ = report.traffic;
    } else {
      // Of steps alone: validation and checkpoints come later.
      if (later_seconds_.empty()) peak_bytes_ = peak_resident_bytes();
      later_seconds_.push_back(seconds_since(begin));
      later_all_to_all_.push_back(report.communication.all_to_all_s);
    }
    if (is_root()) show(report, begin);
  }

  void show(const train::StepReport& report, Clock::time_point begin) {
    const double seconds = seconds_since(begin);
    const double tokens = static_cast<double>(config_.batch.global_batch * config_.data.sequence_length);
    const train::StepSpeed speed{.seconds = seconds,
                                 .tokens_per_s = tokens / seconds,
                                 .share_of_gemm_peak = tokens / seconds * flops_per_token_ / peak_flops_};
    metrics_->write(report, speed);
    step_seconds_ += seconds;
    tokens_ += tokens;
    double violation = 0.0;
    for (const moe::LayerMonitors& layer : report.layers)
      violation = std::max(violation, layer.max_violation);
    const auto done = static_cast<double>(report.step - first_step_);
    const double remaining =
        std::min(std::max(seconds_left(), 0.0),
                 seconds_since(start_) / done * static_cast<double>(config_.train.steps - report.step));
    progress_.show(
        fmt::format(
            "step {}/{}  loss {:.3f} nats/token  {:.0f} tokens/s  {:.0f} % of GEMM peak  busiest expert "
            "{:.2f}x mean  {} left",
            report.step, config_.train.steps, report.loss, speed.tokens_per_s,
            100.0 * speed.share_of_gemm_peak, 1.0 + violation, format_duration(remaining)),
        report.step == first_step_ + 1 || report.step == config_.train.steps);
  }

  const train::RunConfig& config_;
  train::Trainer& trainer_;
  std::optional<train::MetricsWriter> metrics_;  ///< rank 0's
  Progress progress_;
  double peak_flops_;
  double flops_per_token_;
  Clock::time_point start_;
  std::int64_t first_step_;
  double elapsed_before_;
  std::optional<train::AuditedTraffic> traffic_;  ///< of the first step of this process
  std::vector<double> later_seconds_;
  std::vector<double> later_all_to_all_;  ///< seconds of the same steps, on this rank
  double peak_bytes_ = 0.0;               ///< after two steps
  double step_seconds_ = 0.0;
  double tokens_ = 0.0;
};

std::string describe_run(const train::Trainer& trainer) {
  const model::ParameterAccount account = model::count_parameters(trainer.decoder().config());
  const parallel::Groups& groups = trainer.groups();
  std::string text = fmt::format(
      "model: {} parameters, {} active per token; data: {} training tokens; {} threads",
      format_count(static_cast<double>(account.total)), format_count(static_cast<double>(account.active)),
      format_count(static_cast<double>(trainer.dataset().num_tokens(data::Split::kTrain))),
      at::get_num_threads());
  if (groups.world->size() > 1) {
    text += fmt::format(" on each of {} ranks (dp = {}, ep = {}, edp = {})", groups.world->size(),
                        groups.dp->size(), groups.ep->size(), groups.edp->size());
    if (groups.ep->size() > 1) text += fmt::format(", dispatcher {}", enum_name(groups.dispatcher.kind));
  }
  if (const auto reason = model::not_of_family(trainer.decoder().config())) {
    text += fmt::format("; checkpoints are of collegium_moe, which transformers refuses, not of {}: {}",
                        enum_name(trainer.decoder().config().family), *reason);
  }
  return text;
}

}  // namespace

TrainSummary run_training(const train::RunConfig& config, const TrainRequest& request,
                          const std::shared_ptr<comm::Communicator>& world) {
  train::Trainer trainer(config, world);
  if (trainer.groups().is_root()) log_info(describe_run(trainer));
  if (!request.record_routing.empty() && !request.replay_routing.empty())
    moe::require_different_files(request.record_routing, request.replay_routing);
  train::require_validation(trainer.dataset(), train::validation_shape(config),
                            trainer.decoder().config().moe);
  const RunSample sample(config, trainer.dataset(), trainer.decoder().config());
  const std::unique_ptr<FolderLock> lock = start_or_resume(config, request, trainer);
  install_stop_signals();
  Loop loop(config, trainer);
  // Only now can nothing be refused any more.
  if (request.fresh && trainer.groups().is_root()) train::remove_checkpoints(config.run_folder);
  TrainSummary summary = loop.run();
  summary.metrics = std::filesystem::path(config.run_folder) / "metrics.jsonl";
  summary.dispatcher = enum_name(trainer.groups().dispatcher.kind);
  summary.unigram_entropy = trainer.dataset().index().unigram_entropy;
  summary.domains = trainer.dataset().index().domains;
  if (summary.stop == Stop::kSignal) return summary;
  summary.comparison = loop.compare();
  summary.validation = loop.validate();
  summary.sample = sample.generate(trainer);
  return summary;
}

}  // namespace collegium::cli
