// SPDX-License-Identifier: Apache-2.0
#include "collegium/train/validation.h"

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <limits>

#include "collegium/base/error.h"
#include "collegium/moe/balance.h"
#include "collegium/parallel/shares.h"
#include "collegium/train/batch.h"

namespace collegium::train {

namespace {

constexpr std::int64_t kSequencesPerRank = 8;
constexpr std::int64_t kShuffles = 20;

// One rank's sums; reduce() makes them those of all ranks.
class Validation {
 public:
  Validation(const model::Decoder& decoder, const data::Dataset& dataset, const parallel::Groups& groups)
      : decoder_(decoder),
        dp_(*groups.dp),
        num_domains_(static_cast<std::int64_t>(dataset.index().domains.size())),
        domain_sums_(at::zeros({2, num_domains_}, at::kDouble)),
        loads_(static_cast<std::size_t>(decoder.num_moe_layers())),
        sums_(loads_.size(), moe::MonitorSums(decoder.config().moe.num_experts)) {}

  // This rank's part of a batch.
  void add(const MicroBatch& batch, std::int64_t unit, bool mask_documents) {
    model::ForwardOptions options;
    options.context.first_sequence = batch.first_sequence;
    if (mask_documents) options.document_ids_BS = batch.document_ids_BS;
    const model::ForwardResult forward = decoder_.forward(batch.ids_BS, options);
    for (std::int64_t b = 0; b < batch.ids_BS.size(0); ++b) {
      const at::Tensor targets = batch.targets_BS.narrow(0, b, 1);
      const std::int64_t domain = batch.domain_B[static_cast<std::size_t>(b)];
      domain_sums_[0][domain] +=
          model::cross_entropy_sum(decoder_, forward.hidden_BSD.narrow(0, b, 1), targets);
      domain_sums_[1][domain] += (targets >= 0).sum();
    }
    for (std::size_t layer = 0; layer < sums_.size(); ++layer) {
      const moe::RouterStatistics& statistics = forward.layers[layer]->statistics;
      sums_[layer].add(moe::RouterTotals(statistics), statistics.max_abs_logit);
    }
    gather_loads(batch, forward, unit);
  }

  ValidationResult reduce() {
    std::vector<at::Tensor> parts = {domain_sums_.view({-1})};
    at::Tensor logits = at::zeros({static_cast<std::int64_t>(sums_.size())}, at::kDouble);
    std::vector<moe::RouterTotals> totals;
    for (std::size_t layer = 0; layer < sums_.size(); ++layer) {
      totals.push_back(sums_[layer].totals());
      parts.push_back(totals.back().values());
      logits[static_cast<std::int64_t>(layer)] = sums_[layer].max_abs_logit();
    }
    const at::Tensor all = at::cat(parts);
    dp_.all_reduce(all).wait();
    dp_.all_reduce(logits, comm::ReduceOp::kMax).wait();
    std::int64_t begin = 2 * num_domains_;
    const at::Tensor domain_sums = all.narrow(0, 0, begin).view({2, num_domains_});
    ValidationResult result;
    const moe::MoeOptions& options = decoder_.config().moe;
    for (std::size_t layer = 0; layer < sums_.size(); ++layer) {
      at::Tensor& values = totals[layer].values();
      values = all.narrow(0, begin, values.numel());
      begin += values.numel();
      moe::MonitorSums sums(options.num_experts);
      sums.add(totals[layer], logits[static_cast<std::int64_t>(layer)].item<double>());
      result.monitors.push_back(sums.monitors(options));
      result.specialization.push_back(specialization(
          loads_[layer], model::layer_number(decoder_.config(), layer), num_domains_, kShuffles, 0));
    }
    result.hf_pooled = moe::hf_pooled_loss(options, totals, 0.0, {});
    fill_losses(domain_sums, result);
    return result;
  }

 private:
  // Choices per sequence of all ranks, for the specialisation table.
  void gather_loads(const MicroBatch& batch, const model::ForwardResult& forward, std::int64_t unit) {
    std::vector<at::Tensor> columns = {at::tensor(batch.domain_B, at::kLong).view({-1, 1})};
    for (const auto& layer : forward.layers) columns.push_back(layer->statistics.choice_counts_BE);
    const at::Tensor mine = at::cat(columns, 1).contiguous();
    const at::Tensor all = at::empty({batch.all_sequences, mine.size(1)}, at::kLong);
    dp_.all_gather(mine, all, parallel::share_rows(batch.all_sequences, unit, dp_.size(), 1)).wait();
    const auto* row = all.const_data_ptr<std::int64_t>();
    const std::int64_t num_experts = decoder_.config().moe.num_experts;
    for (std::int64_t b = 0; b < all.size(0); ++b, row += all.size(1)) {
      const auto* counts = row + 1;
      for (SequenceLoads& loads : loads_) {
        loads.domain.push_back(*row);
        loads.choices.emplace_back(counts, counts + num_experts);
        counts += num_experts;
      }
    }
  }

  static void fill_losses(const at::Tensor& domain_sums, ValidationResult& result) {
    double loss = 0.0;
    for (std::int64_t domain = 0; domain < domain_sums.size(1); ++domain) {
      const double sum = domain_sums[0][domain].item<double>();
      const double targets = domain_sums[1][domain].item<double>();
      loss += sum;
      result.num_targets += static_cast<std::int64_t>(targets);
      result.domain_loss.push_back(targets > 0.0 ? sum / targets : std::numeric_limits<double>::quiet_NaN());
    }
    if (result.num_targets > 0) result.loss = loss / static_cast<double>(result.num_targets);
  }

  const model::Decoder& decoder_;
  comm::Communicator& dp_;
  std::int64_t num_domains_;
  at::Tensor domain_sums_;  ///< loss, targets
  std::vector<SequenceLoads> loads_;
  std::vector<moe::MonitorSums> sums_;
};

data::Sampler sampler_of(const data::Dataset& dataset, const ValidationShape& shape) {
  return {dataset, data::Split::kValidation, shape.sequence_length, 0};
}

// The windows that are evaluated: whole groups.
std::int64_t count_windows(const data::Dataset& dataset, const data::Sampler& sampler,
                           const ValidationShape& shape, std::int64_t unit) {
  const std::int64_t wanted = std::min(shape.max_sequences, sampler.num_windows());
  require_config(wanted >= unit,
                 "{}: {} of the validation split's {} sequences of {} tokens are evaluated, fewer than one "
                 "group of model.moe.capacity.group_sequences = {}",
                 dataset.folder().string(), wanted, sampler.num_windows(), shape.sequence_length, unit);
  return wanted - wanted % unit;
}

// The i-th of `count` windows, spread evenly over the split.
data::Window window_of(const data::Sampler& sampler, std::int64_t i, std::int64_t count) {
  return sampler.window_in_order(i * sampler.num_windows() / count);
}

}  // namespace

void require_validation(const data::Dataset& dataset, const ValidationShape& shape,
                        const moe::MoeOptions& options) {
  const data::Sampler sampler = sampler_of(dataset, shape);
  const std::int64_t count =
      count_windows(dataset, sampler, shape, moe::indivisible_sequences(options, /*training=*/false));
  if (!dataset.index().has_loss_mask) return;
  for (std::int64_t i = 0; i < count; ++i) {
    const std::vector<bool> is_target = window_of(sampler, i, count).is_target;
    if (std::find(is_target.begin() + 1, is_target.end(), true) != is_target.end()) return;
  }
  throw ConfigError(fmt::format(
      "{}: none of the {} sequences of {} tokens that are evaluated, of the validation split's {}, has a "
      "target token: prompts alone are in them; evaluate more or longer ones",
      dataset.folder().string(), count, shape.sequence_length, sampler.num_windows()));
}

void check_vocabulary(const data::Dataset& dataset, const model::ModelConfig& config) {
  require_config(dataset.index().vocab_size <= config.vocab_size,
                 "{}: its tokenizer has {} pieces, more than the model's vocab_size = {}",
                 dataset.folder().string(), dataset.index().vocab_size, config.vocab_size);
}

ValidationResult validate_model(const model::Decoder& decoder, const data::Dataset& dataset,
                                const ValidationShape& shape, const parallel::Groups& groups) {
  const at::NoGradGuard no_grad;
  const comm::WhereScope scope(groups.world->where(), {.step = -1, .layer = -1, .phase = "validation"});
  const data::Sampler sampler = sampler_of(dataset, shape);
  const std::int64_t unit = moe::indivisible_sequences(decoder.config().moe, /*training=*/false);
  require_validation(dataset, shape, decoder.config().moe);
  const std::int64_t count = count_windows(dataset, sampler, shape, unit);
  const std::int64_t per_rank = std::max(unit, kSequencesPerRank - kSequencesPerRank % unit);
  const std::int64_t per_batch = per_rank * groups.dp->size();
  Validation validation(decoder, dataset, groups);
  for (std::int64_t begin = 0; begin < count; begin += per_batch) {
    const std::int64_t all = std::min(per_batch, count - begin);
    const parallel::Share share = parallel::share_of(all, unit, groups.dp->size(), groups.dp->rank());
    std::vector<data::Window> windows;
    for (std::int64_t i = begin + share.first; i < begin + share.first + share.count; ++i)
      windows.push_back(window_of(sampler, i, count));
    MicroBatch batch = make_micro_batch(windows, shape.sequence_length, begin + share.first);
    batch.all_sequences = all;
    validation.add(batch, unit, shape.mask_documents);
  }
  return validation.reduce();
}

}  // namespace collegium::train
