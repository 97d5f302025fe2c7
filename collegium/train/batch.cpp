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

/// Where this rank's sequences of a micro-step lie.
struct StepBatches::Part {
  std::int64_t all = 0;           ///< sequences of the micro-step
  std::int64_t first = 0;         ///< this rank's first, within the global batch
  std::int64_t offset = 0;        ///< the same within the micro-step
  std::int64_t count = 0;         ///< this rank's
  std::int64_t first_sample = 0;  ///< of the sampler
};

StepBatches::Part StepBatches::part(std::int64_t index) const {
  const std::int64_t begin = index * shape_.micro_sequences;
  const std::int64_t all = shape_.sequences_of(index);
  const parallel::Share share = parallel::share_of(all, shape_.group_sequences, num_ranks_, rank_);
  return {.all = all,
          .first = begin + share.first,
          .offset = share.first,
          .count = share.count,
          .first_sample = (step_ - 1) * shape_.global_batch + begin + share.first};
}

MicroBatch StepBatches::micro_step(std::int64_t index) const {
  const Part part = this->part(index);
  std::vector<data::Window> windows;
  for (std::int64_t i = 0; i < part.count; ++i) windows.push_back(sampler_.window(part.first_sample + i));
  MicroBatch batch = make_micro_batch(windows, shape_.sequence_length, part.first);
  batch.all_sequences = part.all;
  batch.offset = part.offset;
  return batch;
}

std::int64_t StepBatches::count_targets() const {
  std::int64_t count = 0;
  for (std::int64_t index = 0; index < num_micro_steps(); ++index) {
    const Part part = this->part(index);
    if (!sampler_.has_loss_mask()) {
      count += part.count * shape_.sequence_length;
      continue;
    }
    for (std::int64_t i = 0; i < part.count; ++i) {
      const std::vector<bool> is_target = sampler_.window(part.first_sample + i).is_target;
      count += std::count(is_target.begin() + 1, is_target.end(), true);
    }
  }
  return count;
}

}  // namespace collegium::train
