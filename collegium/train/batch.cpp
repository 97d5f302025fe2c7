// SPDX-License-Identifier: Apache-2.0
#include "collegium/train/batch.h"

#include <ATen/ops/empty.h>

#include <algorithm>

#include "collegium/parallel/shares.h"

namespace collegium::train {

namespace {

constexpr std::int64_t kNoTarget = -100;

}  // namespace

MicroBatch make_micro_batch(const std::vector<data::Window>& windows, std::int64_t length,
                            std::int64_t first_sequence) {
  const auto num_sequences = static_cast<std::int64_t>(windows.size());
  MicroBatch batch{.first_sequence = first_sequence,
                   .all_sequences = num_sequences,
                   .offset = 0,
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

std::vector<MicroBatch> make_step(const data::Sampler& sampler, std::int64_t step, const StepShape& shape,
                                  int num_ranks, int rank) {
  std::vector<MicroBatch> batches;
  for (std::int64_t first = 0; first < shape.global_batch; first += shape.micro_sequences) {
    const std::int64_t all = std::min(shape.micro_sequences, shape.global_batch - first);
    const parallel::Share share = parallel::share_of(all, shape.group_sequences, num_ranks, rank);
    std::vector<data::Window> windows;
    for (std::int64_t i = 0; i < share.count; ++i)
      windows.push_back(sampler.window((step - 1) * shape.global_batch + first + share.first + i));
    MicroBatch batch = make_micro_batch(windows, shape.sequence_length, first + share.first);
    batch.all_sequences = all;
    batch.offset = share.first;
    batches.push_back(std::move(batch));
  }
  return batches;
}

}  // namespace collegium::train
