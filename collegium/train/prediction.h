// SPDX-License-Identifier: Apache-2.0
#pragma once

// A run beside what the planner says of it: bytes of the four arrows, memory of a rank, seconds of a step.

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "collegium/comm/ledger.h"
#include "collegium/moe/routing_record.h"
#include "collegium/parallel/groups.h"
#include "collegium/plan/own_run.h"
#include "collegium/train/run_config.h"

namespace collegium::train {

/// What     The model as the planner takes it. `model` is complete (vocabulary, head size).
plan::ModelSpec model_spec(const model::ModelConfig& model);

/// What     The run as the planner takes it. `model` is complete (vocabulary, head size).
plan::OwnRun own_run(const RunConfig& config, const model::ModelConfig& model,
                     const parallel::Groups& groups);

/// What     What this rank sent in dispatch, combine and their backward passes since the ledger was cleared.
plan::ArrowBytes sent_in_arrows(const comm::Ledger& ledger);

/// What     The choices of one layer and micro-step, ids_TK int32 [T, K], as the planner reads them.
plan::RoutingRecord routing_record(const moe::RoutingKey& key, const at::Tensor& ids_TK,
                                   std::int64_t num_experts);

/// One step's exchange, counted by the ledger and by the planner from the step's own routing.
struct AuditedTraffic {
  plan::ArrowBytes predicted;  ///< of this rank
  plan::ArrowBytes measured;
  double imbalance = 1.0;  ///< rows of the fullest rank over the mean, mean over layers and micro-steps
};
/// What     `routing` holds the choices of the step's layers and micro-steps that were not dropped, of all
///          ranks.
AuditedTraffic audit_traffic(const plan::OwnRun& run, const plan::RoutingCounts& routing, std::int64_t step,
                             const parallel::Groups& groups);

/// A figure of the run; nothing is predicted of time without a cluster.
struct PredictedFigure {
  std::string name;
  std::string unit;  ///< "bytes", "s" or "share"
  std::optional<double> predicted;
  double measured = 0.0;
};
/// What the run measured.
struct MeasuredRun {
  double memory_bytes = 0.0;      ///< of the fullest rank
  double step_s = 0.0;            ///< median of the steps after the first
  double all_to_all_share = 0.0;  ///< of it, in each step of the rank with least
  AuditedTraffic traffic;         ///< of all ranks
};
/// What     Memory, step time, bytes of the arrows and the share of all_to_all, side by side. Time on
///          config.planner.cluster, if one is named.
std::vector<PredictedFigure> compare_run(const RunConfig& config, const plan::OwnRun& run,
                                         const MeasuredRun& measured);
/// What     "predicted | measured | difference", a line per figure.
std::string comparison_text(const std::vector<PredictedFigure>& figures);
Json comparison_json(const std::vector<PredictedFigure>& figures);

}  // namespace collegium::train
