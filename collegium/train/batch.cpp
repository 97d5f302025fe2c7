// SPDX-License-Identifier: Apache-2.0
#include "collegium/train/batch.h"

#include <ATen/ops/empty.h>

#include <algorithm>

namespace collegium::train {

namespace {

constexpr std::int64_t kNoTarget = -100;

}  // namespace

MicroBatch make_micro_batch(const std::vector<data::Window>& windows, std::int64_t first_sequence) {
  const auto num_sequences = static_cast<std::int64_t>(windows.size());
  const auto length = static_cast<std::int64_t>(windows.at(0).tokens.size()) - 1;
  MicroBatch batch{.first_sequence = first_sequence,
                   .ids_BS = at::empty({num_sequences, length}, at::kLong),
                   .targets_BS = at::empty({num_sequences, length}, at::kLong),
                   .document_ids_BS = at::empty({num_sequences, length}, at::kLong),
                   .domain_B = {},
                   .num_targets = 0};
  auto* ids = batch.ids_BS.mutable_data_ptr<std::int64_t>();
  auto* targets = batch.targets_BS.mutable_data_ptr<std::int64_t>();
  auto* documents = batch.document_ids_BS.mutable_data_ptr<std::int64_t>();
  for (const data::Window& window : windows) {
    batch.domain_B.push_back(window.domain);
    for (std::size_t s = 0; s < static_cast<std::size_t>(length); ++s) {
      const bool is_target = window.is_target[s + 1];
      *ids++ = window.tokens[s];
      *targets++ = is_target ? window.tokens[s + 1] : kNoTarget;
      *documents++ = window.document_ids[s];
      batch.num_targets += is_target ? 1 : 0;
    }
  }
  return batch;
}

std::vector<MicroBatch> make_step(const data::Sampler& sampler, std::int64_t step, std::int64_t global_batch,
                                  std::int64_t micro_sequences) {
  std::vector<MicroBatch> batches;
  for (std::int64_t first = 0; first < global_batch; first += micro_sequences) {
    std::vector<data::Window> windows;
    for (std::int64_t i = first; i < std::min(global_batch, first + micro_sequences); ++i) {
      windows.push_back(sampler.window((step - 1) * global_batch + i));
    }
    batches.push_back(make_micro_batch(windows, first));
  }
  return batches;
}

}  // namespace collegium::train
