// SPDX-License-Identifier: Apache-2.0
#pragma once

// The training loop's body: one optimizer step at a time, from a batch to updated weights.

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "collegium/data/dataset.h"
#include "collegium/model/decoder.h"
#include "collegium/moe/monitors.h"
#include "collegium/moe/routing_record.h"
#include "collegium/optim/master_weights.h"
#include "collegium/train/batch.h"
#include "collegium/train/checkpoint.h"
#include "collegium/train/run_config.h"

namespace collegium::train {

struct StepReport {
  std::int64_t step = 0;
  double loss = 0.0;                            ///< cross-entropy, nats per target token
  double balance_loss = 0.0;                    ///< sum of coefficient times loss
  double normalized_balance = 0.0;              ///< 1 = balanced
  std::map<std::string, double> balance_terms;  ///< without coefficients
  double learning_rate = 0.0;
  optim::GradientNorm gradient;
  double clip_factor = 1.0;
  std::int64_t num_targets = 0;
  std::vector<moe::LayerMonitors> layers;
};

class Trainer {
 public:
  /// What     Allocates model and optimizer state from the run's seed, or from model.init.
  /// Throws   ConfigError for data, model or freeze patterns that do not fit; nothing is written.
  explicit Trainer(const RunConfig& config);

  /// What     One optimizer step: forward and backward of every micro-step, clipping, AdamW, expert biases.
  /// Math     loss = sum CE / target tokens of the whole step + sum over micro-steps of (tokens / step
  /// tokens) balance loss. Order    Bit-identical for the same state, threads and dtype. Throws   Error when
  /// a loss or gradient is not finite, naming step, layer and tensor; the weights are then unchanged.
  StepReport step();

  void record_routing(const std::filesystem::path& file);
  void replay_routing(const std::filesystem::path& file);
  /// Continues from a checkpoint; with `weights_only` from its weights alone, at step 0.
  void resume(const std::filesystem::path& checkpoint, bool weights_only);
  std::filesystem::path save(double elapsed_seconds);

  const model::Decoder& decoder() const { return *decoder_; }
  const data::Dataset& dataset() const { return dataset_; }
  const TrainingState& state() const { return state_; }
  const optim::MasterWeights& masters() const { return *masters_; }

 private:
  struct MicroResult {
    double loss_sum = 0.0;
  };
  MicroResult run_micro_step(const MicroBatch& batch, std::int64_t micro_step, const MicroBatch& totals,
                             StepReport& report, std::vector<moe::MonitorSums>& monitors);
  void update_biases(const std::vector<moe::MonitorSums>& monitors);
  [[noreturn]] void explain_non_finite(const MicroBatch& batch, const model::ForwardOptions& options,
                                       double loss) const;

  RunConfig config_;
  data::Dataset dataset_;
  data::Sampler sampler_;
  std::unique_ptr<model::Decoder> decoder_;
  std::unique_ptr<optim::MasterWeights> masters_;
  TrainingState state_;
  std::unique_ptr<moe::RoutingRecorder> recorder_;
  std::unique_ptr<moe::RoutingReplay> replay_;
};

}  // namespace collegium::train
