// SPDX-License-Identifier: Apache-2.0
#include "collegium/train/trainer.h"

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/zeros.h>

#include <cmath>
#include <optional>

#include "collegium/base/error.h"
#include "collegium/base/file.h"
#include "collegium/comm/local/local.h"
#include "collegium/model/checkpoint_io.h"
#include "collegium/model/tensor_io.h"
#include "collegium/moe/balance.h"
#include "collegium/optim/adamw.h"
#include "collegium/parallel/memory_check.h"
#include "collegium/parallel/shares.h"
#include "collegium/train/freeze.h"
#include "collegium/train/non_finite.h"
#include "collegium/train/on_all_ranks.h"
#include "collegium/train/validation.h"

namespace collegium::train {

namespace {

// Balance losses enter weighted by their micro-step's share of the optimizer step's tokens.
moe::RouterStatisticsGradient scaled(const moe::RouterStatisticsGradient& gradient, double factor) {
  const auto scale = [&](const at::Tensor& t) { return t.defined() ? t * factor : t; };
  return {.prob_sums_BE = scale(gradient.prob_sums_BE),
          .importance_BE = scale(gradient.importance_BE),
          .load_BE = scale(gradient.load_BE),
          .squared_lse = gradient.squared_lse * factor};
}

// Ranks that read different files, or were given different --set, would train different models.
void require_same_config(comm::Communicator& world, const RunConfig& config, const data::Dataset& dataset) {
  require_same_on_all_ranks(world, run_config_json(config, dataset),
                            [](std::size_t rank, const Json& theirs, const Json& first) {
                              return fmt::format("rank {} was given another run than rank 0: {}", rank,
                                                 first_difference(theirs, first));
                            });
}

// The ledger's name for what only comparisons send.
constexpr const char* kAudit = "audit";

StepShape step_shape(const RunConfig& config) {
  return {.sequence_length = config.data.sequence_length,
          .global_batch = config.batch.global_batch,
          .micro_sequences = config.batch.micro_sequences,
          .group_sequences = moe::indivisible_sequences(config.model.moe, /*training=*/true)};
}

}  // namespace

/// What a micro-step comes to over all ranks.
struct Trainer::MicroSums {
  double loss_sum = 0.0;
  std::vector<moe::RouterTotals> totals;  ///< per MoE layer
};

Trainer::Trainer(const RunConfig& config) : Trainer(config, comm::single_rank_world()) {}

Trainer::Trainer(const RunConfig& config, const std::shared_ptr<comm::Communicator>& world)
    : config_(config),
      groups_(parallel::make_groups(world, config.parallel, config.model.moe)),
      dataset_(config.data.path),
      sampler_(dataset_, data::Split::kTrain, config.data.sequence_length, config.train.seed) {
  config_ = with_tokens_of(dataset_, config_);
  require_same_config(*groups_.world, config_, dataset_);
  const at::ScalarType dtype = model::parse_dtype(config_.train.dtype, "train.dtype");
  parallel::require_memory(config_.model, groups_, static_cast<std::int64_t>(c10::elementSize(dtype)),
                           config_.batch.micro_sequences * config_.data.sequence_length);
  // All that may be refused, before the weights take their memory.
  const Freezing freezing = find_frozen(config_.model, config_.model_source.freeze);
  moe::ExpertTransport transport = parallel::make_transport(groups_, config_.parallel);
  const model::ExpertRange held = groups_.held_experts();
  std::vector<model::Parameter> parameters;
  require_tokenizer_of(config_.model_source.init);
  if (groups_.is_root()) companions_ = read_companions();
  if (config_.model_source.init.empty()) {
    parameters = model::list_parameters(config_.model, held);
    model::initialize_parameters(config_.model, config_.train.seed, dtype, parameters);
  } else {
    if (groups_.is_root()) warn_of_changed_weights(config_.model_source.init);
    parameters = model::load_parameters(config_.model_source.init, config_.model, dtype, held);
  }
  freeze_parameters(config_.model, freezing, parameters);
  decoder_ = std::make_unique<model::Decoder>(config_.model, std::move(parameters), std::move(transport));
  build_optimizer_state();
  state_.run_config = run_config_json(config_, dataset_);
}

void Trainer::build_optimizer_state() {
  masters_ = std::make_unique<optim::MasterWeights>(decoder_->parameters());
  std::vector<parallel::GradientSlot> slots;
  for (const optim::Slot& slot : masters_->slots()) {
    slots.push_back(
        {.leaf = slot.value, .sum = slot.gradient, .expert = slot.kind == model::ParameterKind::kExpert});
  }
  gradient_sync_ = std::make_unique<parallel::GradientSync>(
      groups_, config_.parallel, std::move(slots), masters_->dense_gradients(), masters_->expert_gradients());
}

StepBatches Trainer::batches(std::int64_t step) const {
  return {sampler_, step, step_shape(config_), groups_.dp->size(), groups_.dp->rank()};
}

std::int64_t Trainer::sum_targets(const StepBatches& batches) {
  const at::Tensor sum = at::scalar_tensor(batches.count_targets(), at::kLong);
  groups_.dp->all_reduce(sum).wait();
  return sum.item<std::int64_t>();
}

model::ForwardOptions Trainer::forward_options(const MicroBatch& batch, std::int64_t micro_step,
                                               std::int64_t step) const {
  model::ForwardOptions options;
  options.recompute = config_.train.recompute;
  options.context = {.first_sequence = batch.first_sequence,
                     .seed = config_.train.seed,
                     .step = step,
                     .layer = 0,
                     .training = true,
                     .padding_T = {}};
  if (config_.data.mask_documents) options.document_ids_BS = batch.document_ids_BS;
  if (replay_) options.replayed_ids = replay_->ids_of_layers(batch, step, micro_step);
  return options;
}

Trainer::MicroSums Trainer::sum_over_ranks(const model::ForwardResult& forward, double local_loss) {
  const comm::WhereScope scope(groups_.dp->where(),
                               {.step = groups_.dp->where().step, .layer = -1, .phase = "losses"});
  MicroSums sums;
  std::vector<at::Tensor> parts = {at::scalar_tensor(local_loss, at::kDouble).view({1})};
  for (const auto& layer : forward.layers) {
    sums.totals.emplace_back(layer->statistics);
    parts.push_back(sums.totals.back().values());
  }
  const at::Tensor all = at::cat(parts);
  groups_.dp->all_reduce(all).wait();
  sums.loss_sum = all[0].item<double>();
  std::int64_t begin = 1;
  for (moe::RouterTotals& totals : sums.totals) {
    totals.values().copy_(all.narrow(0, begin, totals.values().numel()));
    begin += totals.values().numel();
  }
  return sums;
}

// The choices of all ranks, in the order of the micro-step's sequences.
at::Tensor Trainer::gather_ids(const MicroBatch& batch, const at::Tensor& ids_TK) {
  const std::int64_t length = config_.data.sequence_length;
  const StepShape shape = step_shape(config_);
  const at::Tensor all_ids_TK = at::empty({batch.all_sequences * length, ids_TK.size(1)}, ids_TK.options());
  groups_.dp
      ->all_gather(
          ids_TK, all_ids_TK,
          parallel::share_rows(batch.all_sequences, shape.group_sequences, groups_.dp->size(), length))
      .wait();
  return all_ids_TK;
}

void Trainer::audit(const MicroBatch& batch, const moe::RoutingKey& key, const at::Tensor& ids_TK) {
  const comm::WhereScope scope(groups_.dp->where(), {.step = key.step, .layer = key.layer, .phase = kAudit});
  const at::Tensor all_ids_TK = gather_ids(batch, ids_TK);
  audited_->experts = config_.model.moe.num_experts;
  audited_->top_k = ids_TK.size(1);
  audited_->records.push_back(routing_record(key, all_ids_TK, config_.model.moe.num_experts));
}

double Trainer::run_micro_step(const MicroBatch& batch, std::int64_t micro_step, bool last,
                               StepReport& report) {
  const model::ForwardOptions options = forward_options(batch, micro_step, report.step);
  const model::ForwardResult forward = decoder_->forward(batch.ids_BS, options);
  const at::Tensor loss = model::cross_entropy_sum(*decoder_, forward.hidden_BSD, batch.targets_BS);
  const MicroSums sums = sum_over_ranks(forward, loss.item<double>());

  std::vector<moe::LayerStatistics> layers;
  for (std::size_t i = 0; i < forward.layers.size(); ++i)
    layers.push_back({.local = forward.layers[i]->statistics, .totals = sums.totals[i]});
  const moe::BalanceLoss balance = moe::balance_loss(config_.model.moe, layers);
  if (!std::isfinite(sums.loss_sum) || !std::isfinite(balance.total)) {
    explain_non_finite({.step = report.step,
                        .local_cross_entropy = loss.item<double>(),
                        .cross_entropy = sums.loss_sum,
                        .balance = balance,
                        .layers = layers},
                       *decoder_, batch, options, groups_);
  }
  const double share =
      static_cast<double>(batch.all_sequences) / static_cast<double>(config_.batch.global_batch);
  for (std::size_t i = 0; i < layers.size(); ++i) {
    moe::LayerRun& run = *forward.layers[i];
    run.statistics_gradient = scaled(balance.layers[i], share);
    monitors_[i].add(sums.totals[i], run.statistics.max_abs_logit);
    const moe::RoutingKey key{report.step, micro_step, static_cast<std::int64_t>(i)};
    if (recording_) {
      const at::Tensor all_ids_TK = gather_ids(batch, run.routing.chosen_ids_TK);
      if (recorder_) recorder_->append(key, all_ids_TK, config_.model.moe.num_experts);
    }
    if (audited_) audit(batch, key, run.routing.expert_ids_TK);
  }
  // A step whose every target is masked still trains the router's balance.
  const double num_targets = std::max<double>(1.0, static_cast<double>(report.num_targets));
  if (last) gradient_sync_->begin_last_backward();
  (loss / num_targets).backward();
  masters_->accumulate();

  report.balance_loss += share * balance.total;
  report.normalized_balance += share * balance.normalized_balance;
  for (const auto& [name, value] : balance.terms) report.balance_terms[name] += share * value;
  return sums.loss_sum;
}

StepReport Trainer::compute_gradients() {
  StepReport report;
  report.step = state_.step + 1;
  const comm::WhereScope scope(groups_.world->where(), {.step = report.step, .layer = -1, .phase = "step"});
  groups_.ledger->clear();
  const StepBatches batches = this->batches(report.step);
  report.num_targets = sum_targets(batches);
  monitors_.assign(static_cast<std::size_t>(decoder_->num_moe_layers()),
                   moe::MonitorSums(config_.model.moe.num_experts));
  double loss_sum = 0.0;
  const std::int64_t num_micro_steps = batches.num_micro_steps();
  for (std::int64_t i = 0; i < num_micro_steps; ++i)
    loss_sum += run_micro_step(batches.micro_step(i), i, i + 1 == num_micro_steps, report);
  report.loss = report.num_targets > 0 ? loss_sum / static_cast<double>(report.num_targets) : 0.0;
  gradient_sync_->finish(report.step);
  masters_->clear_frozen_gradients();
  reduce_norm_and_monitors(report);
  const double clip = config_.optimizer.clip_norm;
  report.clip_factor = clip > 0.0 && report.gradient.total > clip ? clip / report.gradient.total : 1.0;
  report.learning_rate = config_.optimizer.learning_rate *
                         optim::rate_factor(config_.schedule, report.step, config_.train.steps);
  for (const moe::MonitorSums& sums : monitors_) report.layers.push_back(sums.monitors(config_.model.moe));
  if (recorder_) recorder_->flush();
  report.communication = report_communication();
  if (audited_) report.traffic = audit_traffic(own_run(), *audited_, report.step, groups_);
  audited_.reset();
  return report;
}

// Every expert is held by one rank of an ep group, so its squares are summed over ep; dense gradients are the
// same everywhere.
void Trainer::reduce_norm_and_monitors(StepReport& report) {
  const comm::WhereScope scope(groups_.world->where(),
                               {.step = report.step, .layer = -1, .phase = "norm and monitors"});
  optim::GradientSquares squares;
  std::optional<optim::NonFiniteGradient> failure;
  try {
    squares = optim::gradient_squares(masters_->slots());
  } catch (const optim::NonFiniteGradient& error) {
    failure = error;
  }
  const auto num_layers = static_cast<std::int64_t>(monitors_.size());
  const at::Tensor largest = at::zeros({num_layers + 1}, at::kDouble);
  for (std::int64_t i = 0; i < num_layers; ++i)
    largest[i] = monitors_[static_cast<std::size_t>(i)].max_abs_logit();
  largest[num_layers] = failure ? static_cast<double>(failure->slot) : -1.0;
  groups_.dp->all_reduce(largest, comm::ReduceOp::kMax).wait();
  const double worst_slot = largest[num_layers].item<double>();
  if (worst_slot >= 0.0) {
    // An expert's gradient is known to the ranks that hold it: who saw what is nearest the output reports.
    const bool reports = failure && static_cast<double>(failure->slot) == worst_slot;
    if (!reports) groups_.world->barrier();
    throw Error(
        fmt::format("step {}: {}", report.step, failure ? failure->what() : "a gradient is not finite"));
  }
  if (squares.contains(optim::kExpertKind)) {
    const at::Tensor sum = at::scalar_tensor(squares[optim::kExpertKind], at::kDouble);
    groups_.ep->all_reduce(sum).wait();
    squares[optim::kExpertKind] = sum.item<double>();
  }
  report.gradient = optim::gradient_norm(squares);
  for (std::int64_t i = 0; i < num_layers; ++i)
    monitors_[static_cast<std::size_t>(i)].raise_max_abs_logit(largest[i].item<double>());
}

void Trainer::update_weights(StepReport& report) {
  const at::NoGradGuard no_grad;
  optim::adamw_step(config_.optimizer, report.learning_rate, report.clip_factor, report.step,
                    masters_->slots());
  if (config_.model.moe.router.bias_balancing) update_biases();
  state_.step = report.step;
  state_.samples += config_.batch.global_batch;
  state_.tokens += report.num_targets;
}

StepReport Trainer::step() {
  StepReport report = compute_gradients();
  update_weights(report);
  return report;
}

void Trainer::update_biases() {
  std::size_t moe_layer = 0;
  for (std::int64_t layer = 0; layer < config_.model.num_layers; ++layer) {
    if (!config_.model.moe_layers[static_cast<std::size_t>(layer)]) continue;
    const std::size_t index = moe_layer++;
    const model::Parameter& bias = decoder_->parameter(fmt::format("layers.{}.moe.expert_bias", layer));
    if (bias.frozen.defined()) continue;
    at::Tensor value = bias.value;
    moe::update_expert_bias(value, monitors_[index].totals().choice_counts_E().to(at::kLong),
                            config_.model.moe.router.bias_update_rate);
  }
}

CommReport Trainer::report_communication() {
  const comm::LedgerEntry all =
      groups_.ledger->sum([](const comm::LedgerKey& key) { return key.phase != kAudit; });
  const comm::Overlap all_to_all = groups_.ledger->overlap(comm::Operation::kAllToAll);
  return {.bytes_within_nodes = all.bytes_within_nodes,
          .bytes_between_nodes = all.bytes_between_nodes,
          .all_to_all_s = all_to_all.communicating_s,
          .all_to_all_exposed_s = all_to_all.communicating_s - all_to_all.hidden_s,
          .hidden_share = groups_.ledger->overlap().hidden_share()};
}

void Trainer::record_routing(const std::filesystem::path& file) {
  recording_ = true;
  if (groups_.is_root()) recorder_ = std::make_unique<moe::RoutingRecorder>(file, state_.step);
}
void Trainer::replay_routing(const std::filesystem::path& file, std::int64_t last_step) {
  replay_ = std::make_unique<Replay>(file, ReplayRequest{.shape = step_shape(config_),
                                                         .moe = config_.model.moe,
                                                         .num_moe_layers = decoder_->num_moe_layers(),
                                                         .first_step = state_.step + 1,
                                                         .last_step = last_step});
}

// Weights learned the meaning of another tokenizer's ids.
void Trainer::require_tokenizer_of(const std::filesystem::path& model_folder) const {
  if (!model_folder.empty() && !config_.data.any_tokenizer)
    data::require_same_tokenizer(dataset_, model_folder, "--set data.any_tokenizer=true");
}

void Trainer::resume(const std::filesystem::path& checkpoint, bool weights_only) {
  const at::NoGradGuard no_grad;
  if (weights_only) require_tokenizer_of(checkpoint);
  if (!weights_only) {
    state_ = load_checkpoint(checkpoint, *decoder_, *masters_, groups_);
    state_.run_config = run_config_json(config_, dataset_);
    return;
  }
  const auto weights =
      model::load_parameters(checkpoint, config_.model, decoder_->dtype(), groups_.held_experts());
  for (std::size_t i = 0; i < weights.size(); ++i) decoder_->parameters()[i].value.copy_(weights[i].value);
  gradient_sync_.reset();
  build_optimizer_state();
}

// The tokenizer that made the tokens, and what else came with the model that the run started from. Files of
// another tokenizer stay behind.
std::vector<CompanionFile> Trainer::read_companions() const {
  std::vector<CompanionFile> files;
  const auto add = [&](const std::filesystem::path& file) {
    files.push_back({.name = file.filename().string(), .content = read_file(file)});
  };
  if (dataset_.has_tokenizer()) add(dataset_.tokenizer_file());
  const std::filesystem::path init = config_.model_source.init;
  if (init.empty()) return files;
  std::vector<const char*> names = {"generation_config.json", "chat_template.jinja"};
  if (!config_.data.any_tokenizer) {
    for (const char* name : {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                             "added_tokens.json", "vocab.json", "merges.txt"})
      names.push_back(name);
    if (!dataset_.has_tokenizer()) names.push_back("tokenizer.model");
  }
  for (const char* name : names) {
    if (path_exists(init / name)) add(init / name);
  }
  return files;
}

std::filesystem::path Trainer::save(double elapsed_seconds) {
  state_.elapsed_seconds = elapsed_seconds;
  return save_checkpoint(config_.run_folder, *decoder_, *masters_, state_, companions_,
                         config_.checkpoint.keep_last, groups_);
}

}  // namespace collegium::train
