// SPDX-License-Identifier: Apache-2.0
#include "collegium/train/replay.h"

namespace collegium::train {

Replay::Replay(const std::filesystem::path& file, const ReplayRequest& request)
    : request_(request), records_(file) {
  const StepShape& shape = request_.shape;
  for (std::int64_t step = request_.first_step; step <= request_.last_step; ++step) {
    for (std::int64_t micro_step = 0; micro_step < shape.num_micro_steps(); ++micro_step) {
      const std::int64_t num_tokens = shape.sequences_of(micro_step) * shape.sequence_length;
      for (std::int64_t layer = 0; layer < request_.num_moe_layers; ++layer) {
        records_.require({.step = step, .micro_step = micro_step, .layer = layer}, num_tokens,
                         moe::record_width(request_.moe), request_.moe.num_experts);
      }
    }
  }
}

std::vector<at::Tensor> Replay::ids_of_layers(const MicroBatch& batch, std::int64_t step,
                                              std::int64_t micro_step) const {
  const std::int64_t length = request_.shape.sequence_length;
  std::vector<at::Tensor> ids;
  for (std::int64_t layer = 0; layer < request_.num_moe_layers; ++layer) {
    const at::Tensor all_ids_TK = records_.ids_TK({.step = step, .micro_step = micro_step, .layer = layer},
                                                  batch.all_sequences * length,
                                                  moe::record_width(request_.moe), request_.moe.num_experts);
    ids.push_back(all_ids_TK.narrow(0, batch.offset * length, batch.ids_BS.size(0) * length));
  }
  return ids;
}

}  // namespace collegium::train
