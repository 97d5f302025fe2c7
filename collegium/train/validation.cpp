// SPDX-License-Identifier: Apache-2.0
#include "collegium/train/validation.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "collegium/base/error.h"
#include "collegium/moe/balance.h"
#include "collegium/train/batch.h"

namespace collegium::train {

namespace {

constexpr std::int64_t kSequencesPerBatch = 8;
constexpr std::int64_t kShuffles = 20;

struct Sums {
  double loss = 0.0;
  std::int64_t targets = 0;
};

// Per-sequence choice counts of one layer, for the specialisation table.
void append_loads(const moe::RouterStatistics& statistics, const std::vector<std::int64_t>& domains,
                  SequenceLoads& loads) {
  const at::Tensor counts = statistics.choice_counts_BE.contiguous();
  const auto* data = counts.const_data_ptr<std::int64_t>();
  for (std::size_t b = 0; b < domains.size(); ++b) {
    const auto* row = data + static_cast<std::int64_t>(b) * counts.size(1);
    loads.domain.push_back(domains[b]);
    loads.choices.emplace_back(row, row + counts.size(1));
  }
}

// Statistics of several batches, one below the other: balance losses add the rows.
void append_rows(moe::RouterStatistics& all, const moe::RouterStatistics& more) {
  if (!all.num_tokens_B.defined()) {
    all = more;
    return;
  }
  all.num_tokens_B = at::cat({all.num_tokens_B, more.num_tokens_B});
  all.choice_counts_BE = at::cat({all.choice_counts_BE, more.choice_counts_BE});
  all.prob_sums_BE = at::cat({all.prob_sums_BE, more.prob_sums_BE});
}

}  // namespace

void check_vocabulary(const data::Dataset& dataset, const model::ModelConfig& config) {
  require_config(dataset.index().vocab_size <= config.vocab_size,
                 "{}: its tokenizer has {} pieces, more than the model's vocab_size = {}",
                 dataset.folder().string(), dataset.index().vocab_size, config.vocab_size);
}

ValidationResult validate_model(const model::Decoder& decoder, const data::Dataset& dataset,
                                std::int64_t sequence_length, std::int64_t max_sequences,
                                bool mask_documents) {
  const at::NoGradGuard no_grad;
  const data::Sampler sampler(dataset, data::Split::kValidation, sequence_length, 0);
  const std::int64_t count = std::min(max_sequences, sampler.num_windows());
  const auto num_domains = static_cast<std::int64_t>(dataset.index().domains.size());
  const auto num_layers = static_cast<std::size_t>(decoder.num_moe_layers());
  std::vector<SequenceLoads> loads(num_layers);
  std::vector<moe::MonitorSums> monitors(num_layers);
  std::vector<moe::RouterStatistics> statistics(num_layers);
  std::vector<Sums> by_domain(static_cast<std::size_t>(num_domains));
  for (std::int64_t begin = 0; begin < count; begin += kSequencesPerBatch) {
    std::vector<data::Window> windows;
    for (std::int64_t i = begin; i < std::min(count, begin + kSequencesPerBatch); ++i) {
      windows.push_back(sampler.window_in_order(i * sampler.num_windows() / count));
    }
    const MicroBatch batch = make_micro_batch(windows, begin);
    model::ForwardOptions options;
    if (mask_documents) options.document_ids_BS = batch.document_ids_BS;
    const model::ForwardResult forward = decoder.forward(batch.ids_BS, options);
    for (std::size_t b = 0; b < windows.size(); ++b) {
      const auto row = static_cast<std::int64_t>(b);
      const at::Tensor targets = batch.targets_BS.narrow(0, row, 1);
      Sums& sums = by_domain[static_cast<std::size_t>(batch.domain_B[b])];
      sums.loss +=
          model::cross_entropy_sum(decoder, forward.hidden_BSD.narrow(0, row, 1), targets).item<double>();
      sums.targets += (targets >= 0).sum().item<std::int64_t>();
    }
    for (std::size_t layer = 0; layer < num_layers; ++layer) {
      append_loads(forward.layers[layer]->statistics, batch.domain_B, loads[layer]);
      append_rows(statistics[layer], forward.layers[layer]->statistics);
      monitors[layer].add(forward.layers[layer]->statistics);
    }
  }
  ValidationResult result;
  double loss = 0.0;
  for (const Sums& sums : by_domain) {
    loss += sums.loss;
    result.num_targets += sums.targets;
    result.domain_loss.push_back(sums.targets > 0 ? sums.loss / static_cast<double>(sums.targets) : 0.0);
  }
  require_config(result.num_targets > 0, "{}: the validation split has no target token",
                 dataset.folder().string());
  result.loss = loss / static_cast<double>(result.num_targets);
  result.hf_pooled = moe::hf_pooled_loss(decoder.config().moe, statistics, 0.0, {});
  for (std::size_t layer = 0; layer < num_layers; ++layer) {
    result.monitors.push_back(monitors[layer].monitors(decoder.config().moe));
    result.specialization.push_back(
        specialization(loads[layer], static_cast<std::int64_t>(layer), num_domains, kShuffles, 0));
  }
  return result;
}

}  // namespace collegium::train
