// SPDX-License-Identifier: Apache-2.0
#pragma once

// The training loop's body: one optimizer step at a time, from a batch to updated weights, on one rank of a
// run. All ranks make the same calls.

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
#include "collegium/parallel/gradient_sync.h"
#include "collegium/parallel/groups.h"
#include "collegium/train/batch.h"
#include "collegium/train/checkpoint.h"
#include "collegium/train/prediction.h"
#include "collegium/train/replay.h"
#include "collegium/train/run_config.h"

namespace collegium::train {

/// What this rank communicated in a step.
struct CommReport {
  std::int64_t bytes_within_nodes = 0;  ///< sent
  std::int64_t bytes_between_nodes = 0;
  double all_to_all_s = 0.0;          ///< some all_to_all was under way
  double all_to_all_exposed_s = 0.0;  ///< of it, this rank stood still
  double hidden_share = 0.0;          ///< of all communication: ran beside computation
};

/// The same on all ranks, but for `communication`.
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
  CommReport communication;
  std::optional<AuditedTraffic> traffic;  ///< of a step that audit_next_step() asked for
};

class Trainer {
 public:
  /// What     Allocates this rank's part of model and optimizer state from the run's seed, or from
  ///          model.init.
  /// Comm     collective over `world`: makes the groups of config.parallel.
  /// Throws   ConfigError for data, model, layout or freeze patterns that do not fit; nothing is written.
  Trainer(const RunConfig& config, const std::shared_ptr<comm::Communicator>& world);
  /// Of a run on one rank.
  explicit Trainer(const RunConfig& config);

  /// What     One optimizer step: forward and backward of every micro-step, clipping, AdamW, expert biases.
  /// Math     loss = sum CE / target tokens of the whole step + sum over micro-steps of (tokens / step
  ///          tokens) balance loss.
  /// Comm     per micro-step the layers' dispatches and combines, and one all_reduce of losses and router
  ///          totals over dp; per step the gradients, and a few numbers.
  /// Order    Bit-identical for the same state, layout, threads and dtype.
  /// Throws   Error when a loss or gradient is not finite, naming step, layer and tensor; the weights are
  ///          then unchanged.
  StepReport step();
  /// The first part of step(): gradients are summed and left in masters(), weights unchanged. For
  /// comparisons.
  StepReport compute_gradients();
  /// The second part, on what compute_gradients() gave.
  void update_weights(StepReport& report);

  /// What     The next step gathers its routing, so that its traffic can be predicted exactly.
  /// Comm     one all_gather of the choices per layer and micro-step of that step.
  void audit_next_step() { audited_.emplace(); }
  /// What     This rank's part of step `step` (1, 2, …), and how step() runs the forward pass of a micro-step
  ///          of it: for measurements of parts of a step.
  StepBatches batches(std::int64_t step) const;
  model::ForwardOptions forward_options(const MicroBatch& batch, std::int64_t micro_step,
                                        std::int64_t step) const;
  /// What     The run as the planner takes it.
  plan::OwnRun own_run() const { return train::own_run(config_, decoder_->config(), groups_); }

  /// Writes the steps from here on; records of earlier steps in the file stay.
  void record_routing(const std::filesystem::path& file);
  /// Takes the experts of the steps from here to `last_step` from a record.
  /// Throws   ConfigError when the record lacks one of these steps or is of another shape.
  void replay_routing(const std::filesystem::path& file, std::int64_t last_step);
  /// Continues from a checkpoint; with `weights_only` from its weights alone, at step 0.
  void resume(const std::filesystem::path& checkpoint, bool weights_only);
  std::filesystem::path save(double elapsed_seconds);

  const model::Decoder& decoder() const { return *decoder_; }
  const data::Dataset& dataset() const { return dataset_; }
  const TrainingState& state() const { return state_; }
  const optim::MasterWeights& masters() const { return *masters_; }
  const parallel::Groups& groups() const { return groups_; }

 private:
  struct MicroSums;

  void build_optimizer_state();
  std::int64_t sum_targets(const StepBatches& batches);
  double run_micro_step(const MicroBatch& batch, std::int64_t micro_step, bool last, StepReport& report);
  MicroSums sum_over_ranks(const model::ForwardResult& forward, double local_loss);
  at::Tensor gather_ids(const MicroBatch& batch, const at::Tensor& ids_TK);
  void audit(const MicroBatch& batch, const moe::RoutingKey& key, const at::Tensor& ids_TK);
  void reduce_norm_and_monitors(StepReport& report);
  void update_biases();
  void require_tokenizer_of(const std::filesystem::path& model_folder) const;
  std::vector<CompanionFile> read_companions() const;
  CommReport report_communication();

  RunConfig config_;
  parallel::Groups groups_;
  data::Dataset dataset_;
  data::Sampler sampler_;
  std::unique_ptr<model::Decoder> decoder_;
  std::unique_ptr<optim::MasterWeights> masters_;
  std::unique_ptr<parallel::GradientSync> gradient_sync_;
  std::vector<moe::MonitorSums> monitors_;  ///< of the step under way, per MoE layer
  TrainingState state_;
  std::vector<CompanionFile> companions_;           ///< on rank 0, as they were when the run began
  std::unique_ptr<moe::RoutingRecorder> recorder_;  ///< on rank 0
  bool recording_ = false;
  std::optional<plan::RoutingCounts> audited_;  ///< what this step's rows were sent by
  std::unique_ptr<Replay> replay_;
};

}  // namespace collegium::train
