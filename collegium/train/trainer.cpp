// SPDX-License-Identifier: Apache-2.0
#include "collegium/train/trainer.h"

#include <ATen/ATen.h>

#include <cmath>

#include "collegium/base/error.h"
#include "collegium/model/checkpoint_io.h"
#include "collegium/model/tensor_io.h"
#include "collegium/moe/balance.h"
#include "collegium/optim/adamw.h"
#include "collegium/train/freeze.h"
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

std::vector<moe::RouterStatistics> statistics_of(const model::ForwardResult& forward) {
  std::vector<moe::RouterStatistics> statistics;
  for (const auto& layer : forward.layers) statistics.push_back(layer->statistics);
  return statistics;
}

RunConfig with_vocabulary(RunConfig config, const data::Dataset& dataset) {
  if (config.model.vocab_size == 0) config.model.vocab_size = dataset.index().vocab_size;
  model::validate(config.model, /*training=*/true);
  check_vocabulary(dataset, config.model);
  return config;
}

}  // namespace

Trainer::Trainer(const RunConfig& config)
    : config_(config),
      dataset_(config.data.path),
      sampler_(dataset_, data::Split::kTrain, config.data.sequence_length, config.train.seed) {
  config_ = with_vocabulary(config_, dataset_);
  const at::ScalarType dtype = model::parse_dtype(config_.train.dtype, "train.dtype");
  std::vector<model::Parameter> parameters;
  if (config_.model_source.init.empty()) {
    parameters = model::list_parameters(config_.model);
    model::initialize_parameters(config_.model, config_.train.seed, dtype, parameters);
  } else {
    parameters = model::load_parameters(config_.model_source.init, config_.model, dtype);
  }
  freeze_parameters(config_.model, config_.model_source.freeze, parameters);
  decoder_ = std::make_unique<model::Decoder>(config_.model, std::move(parameters));
  masters_ = std::make_unique<optim::MasterWeights>(decoder_->parameters());
  state_.run_config = run_config_json(config_);
}

Trainer::MicroResult Trainer::run_micro_step(const MicroBatch& batch, std::int64_t micro_step,
                                             const MicroBatch& totals, StepReport& report,
                                             std::vector<moe::MonitorSums>& monitors) {
  model::ForwardOptions options;
  options.recompute = config_.train.recompute;
  options.context = {.first_sequence = batch.first_sequence,
                     .seed = config_.train.seed,
                     .step = report.step,
                     .layer = 0,
                     .training = true,
                     .padding_T = {}};
  if (config_.data.mask_documents) options.document_ids_BS = batch.document_ids_BS;
  const moe::MoeOptions& moe = config_.model.moe;
  const auto key = [&](std::size_t layer) {
    return moe::RoutingKey{report.step, micro_step, static_cast<std::int64_t>(layer)};
  };
  if (replay_) {
    for (std::size_t layer = 0; layer < monitors.size(); ++layer) {
      options.replayed_ids.push_back(
          replay_->ids_TK(key(layer), batch.ids_BS.numel(), moe.top_k, moe.num_experts));
    }
  }
  const model::ForwardResult forward = decoder_->forward(batch.ids_BS, options);
  const moe::BalanceLoss balance = moe::balance_loss(moe, statistics_of(forward));
  const double share = static_cast<double>(batch.ids_BS.numel()) / static_cast<double>(totals.ids_BS.numel());
  for (std::size_t layer = 0; layer < forward.layers.size(); ++layer) {
    forward.layers[layer]->statistics_gradient = scaled(balance.layers[layer], share);
    monitors[layer].add(forward.layers[layer]->statistics);
    if (recorder_)
      recorder_->append(key(layer), forward.layers[layer]->routing.chosen_ids_TK, moe.num_experts);
  }
  const at::Tensor sum = model::cross_entropy_sum(*decoder_, forward.hidden_BSD, batch.targets_BS);
  const double loss_sum = sum.item<double>();
  if (!std::isfinite(loss_sum) || !std::isfinite(balance.total)) explain_non_finite(batch, options, loss_sum);
  // A step whose every target is masked still trains the router's balance.
  const double num_targets = std::max<double>(1.0, static_cast<double>(totals.num_targets));
  (sum / num_targets).backward();
  masters_->accumulate();

  report.balance_loss += share * balance.total;
  report.normalized_balance += share * balance.normalized_balance;
  for (const auto& [name, value] : balance.terms) report.balance_terms[name] += share * value;
  return {.loss_sum = loss_sum};
}

StepReport Trainer::step() {
  StepReport report;
  report.step = state_.step + 1;
  const auto batches =
      make_step(sampler_, report.step, config_.batch.global_batch, config_.batch.micro_sequences);
  MicroBatch totals;
  totals.ids_BS = at::empty({config_.batch.global_batch, config_.data.sequence_length},
                            at::device(at::kMeta).dtype(at::kLong));
  for (const MicroBatch& batch : batches) totals.num_targets += batch.num_targets;
  std::vector<moe::MonitorSums> monitors(static_cast<std::size_t>(decoder_->num_moe_layers()));
  double loss_sum = 0.0;
  for (std::size_t i = 0; i < batches.size(); ++i) {
    loss_sum += run_micro_step(batches[i], static_cast<std::int64_t>(i), totals, report, monitors).loss_sum;
  }
  report.num_targets = totals.num_targets;
  report.loss = totals.num_targets > 0 ? loss_sum / static_cast<double>(totals.num_targets) : 0.0;

  try {
    report.gradient = optim::gradient_norm(masters_->slots());
  } catch (const Error& error) {
    throw Error(fmt::format("step {}: {}", report.step, error.what()));
  }
  const double clip = config_.optimizer.clip_norm;
  report.clip_factor = clip > 0.0 && report.gradient.total > clip ? clip / report.gradient.total : 1.0;
  report.learning_rate = config_.optimizer.learning_rate *
                         optim::rate_factor(config_.schedule, report.step, config_.train.steps);
  {
    const at::NoGradGuard no_grad;
    optim::adamw_step(config_.optimizer, report.learning_rate, report.clip_factor, report.step,
                      masters_->slots());
    if (config_.model.moe.router.bias_balancing) update_biases(monitors);
  }
  for (const moe::MonitorSums& sums : monitors) report.layers.push_back(sums.monitors(config_.model.moe));
  if (recorder_) recorder_->flush();
  state_.step = report.step;
  state_.samples += config_.batch.global_batch;
  state_.tokens += totals.num_targets;
  return report;
}

void Trainer::update_biases(const std::vector<moe::MonitorSums>& monitors) {
  std::size_t moe_layer = 0;
  for (std::int64_t layer = 0; layer < config_.model.num_layers; ++layer) {
    if (!config_.model.moe_layers[static_cast<std::size_t>(layer)]) continue;
    at::Tensor bias = decoder_->value(fmt::format("layers.{}.moe.expert_bias", layer));
    moe::update_expert_bias(bias, monitors[moe_layer++].choice_counts_E(),
                            config_.model.moe.router.bias_update_rate);
  }
}

void Trainer::explain_non_finite(const MicroBatch& batch, const model::ForwardOptions& options,
                                 double loss) const {
  const at::NoGradGuard no_grad;
  const std::string head =
      fmt::format("step {}: the loss is {}", state_.step + 1, std::isnan(loss) ? "nan" : "infinite");
  for (const model::Parameter& parameter : decoder_->parameters()) {
    if (!at::isfinite(parameter.value).all().item<bool>())
      throw Error(fmt::format("{}: parameter {} is not finite", head, parameter.name));
  }
  model::ForwardOptions watched = options;
  watched.observer = [&](std::int64_t layer, const at::Tensor& x_BSD) {
    if (!at::isfinite(x_BSD).all().item<bool>())
      throw Error(fmt::format("{}: the output of layer {} is the first that is not finite", head, layer));
  };
  decoder_->forward(batch.ids_BS, watched);
  throw Error(fmt::format("{}: every layer's output is finite, the logits are not", head));
}

void Trainer::record_routing(const std::filesystem::path& file) {
  recorder_ = std::make_unique<moe::RoutingRecorder>(file);
}
void Trainer::replay_routing(const std::filesystem::path& file) {
  replay_ = std::make_unique<moe::RoutingReplay>(file);
}

void Trainer::resume(const std::filesystem::path& checkpoint, bool weights_only) {
  const at::NoGradGuard no_grad;
  if (!weights_only) {
    state_ = load_checkpoint(checkpoint, *decoder_, *masters_);
    state_.run_config = run_config_json(config_);
    return;
  }
  const auto weights = model::load_parameters(checkpoint, config_.model, decoder_->dtype());
  for (std::size_t i = 0; i < weights.size(); ++i) decoder_->parameters()[i].value.copy_(weights[i].value);
  masters_ = std::make_unique<optim::MasterWeights>(decoder_->parameters());
}

std::filesystem::path Trainer::save(double elapsed_seconds) {
  state_.elapsed_seconds = elapsed_seconds;
  const auto tokenizer = dataset_.has_tokenizer() ? dataset_.tokenizer_file() : std::filesystem::path();
  return save_checkpoint(config_.run_folder, *decoder_, *masters_, state_, tokenizer,
                         config_.checkpoint.keep_last);
}

}  // namespace collegium::train
