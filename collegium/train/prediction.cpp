// SPDX-License-Identifier: Apache-2.0
#include "collegium/train/prediction.h"

#include <fmt/format.h>

#include <algorithm>

#include "collegium/base/error.h"
#include "collegium/base/units.h"
#include "collegium/model/causal_attention.h"
#include "collegium/model/softmax_loss.h"
#include "collegium/model/tensor_io.h"
#include "collegium/moe/capacity.h"
#include "collegium/ops/product.h"

namespace collegium::train {

namespace {

constexpr std::array kArrows = {"dispatch", "combine", "combine backward", "dispatch backward"};

// Built in: what memory is counted with where no cluster is named.
constexpr const char* kDefaultCluster = "cpu-2core";

plan::Exchange exchange_of(moe::DispatcherKind kind) {
  switch (kind) {
    case moe::DispatcherKind::kUneven:
      return plan::Exchange::kUneven;
    case moe::DispatcherKind::kPadded:
      return plan::Exchange::kPadded;
    case moe::DispatcherKind::kAllgather:
      return plan::Exchange::kAllgather;
    case moe::DispatcherKind::kTwoLevel:
      return plan::Exchange::kTwoLevel;
    case moe::DispatcherKind::kSharedMemory:
      return plan::Exchange::kSharedMemory;
  }
  throw Error("a dispatcher that the planner does not know");
}

std::string figure_text(const PredictedFigure& figure, double value) {
  if (figure.unit == "bytes") return format_bytes(value);
  return figure.unit == "share" ? format_percent(value) : format_duration(value);
}

// Shares differ by points, everything else by a part of what was measured.
std::string difference_text(const PredictedFigure& figure) {
  if (!figure.predicted) return "";
  const double difference = *figure.predicted - figure.measured;
  if (figure.unit == "share") return fmt::format("{:+.1f} points", 100.0 * difference);
  if (difference == 0.0) return "none";
  return figure.measured > 0.0 ? fmt::format("{:+.1f} %", 100.0 * difference / figure.measured) : "";
}

}  // namespace

plan::ModelSpec model_spec(const model::ModelConfig& c) {
  plan::ModelSpec m;
  m.name = "the run's model";
  m.vocab = c.vocab_size;
  m.hidden = c.hidden_size;
  m.layers = c.num_layers;
  m.heads = c.num_heads;
  m.kv_heads = c.num_kv_heads;
  m.head_dim = c.head_dim;
  m.dense_ffn = c.dense_ffn_size;
  m.max_positions = c.max_positions;
  m.tied_embeddings = c.tie_embeddings;
  if (c.qk_norm == model::QkNorm::kPerHead) m.qk_norm = plan::SpecQkNorm::kPerHead;
  if (c.qk_norm == model::QkNorm::kProjection) m.qk_norm = plan::SpecQkNorm::kProjection;
  m.experts = c.moe.num_experts;
  m.top_k = moe::record_width(c.moe);
  m.mean_experts = moe::experts_per_token(c.moe);
  m.expert_ffn = c.moe.ffn_size;
  const moe::SharedExpert shared = c.moe.shared_expert.kind;
  if (shared != moe::SharedExpert::kNone) m.shared_ffn = c.moe.shared_expert.ffn_size;
  if (shared == moe::SharedExpert::kGated) m.shared_gates = 1;
  if (shared == moe::SharedExpert::kResidualMix) m.shared_gates = 2;
  const moe::RouterOptions& router = c.moe.router;
  m.router_noise = router.noise == moe::Noise::kNoisyTopK;
  m.selection_bias = router.bias_balancing;
  if (router.top_groups < router.num_groups) {
    m.routing_groups = router.num_groups;
    m.routing_top_groups = router.top_groups;
  }
  m.moe_layers = c.moe_layers;
  if (c.sliding_window > 0 && c.sliding_window < c.max_positions) {
    m.window = c.sliding_window;
    m.window_layers.assign(static_cast<std::size_t>(c.num_layers), true);
  }
  return m;
}

plan::OwnRun own_run(const RunConfig& config, const model::ModelConfig& model,
                     const parallel::Groups& groups) {
  const moe::MoeOptions& moe = model.moe;
  const moe::OverlapOptions& overlap = config.parallel.overlap;
  plan::OwnRun run;
  run.model = model_spec(model);
  run.dtype = config.train.dtype;
  run.ranks = groups.dp->size();
  run.ep = groups.ep->size();
  for (int rank = 0; rank < run.ranks; ++rank) run.node_of_rank.push_back(groups.dp->node(rank));
  run.exchange = exchange_of(groups.dispatcher.kind);
  run.combine_fp32 = groups.dispatcher.combine_fp32;
  run.chunks = overlap.chunks;
  run.recompute = config.train.recompute;
  run.clipped_qkv = model.clip_qkv > 0.0;
  run.kept_logits =
      moe.router.score == moe::ScoreFunction::kSigmoid || moe.router.noise == moe::Noise::kNoisyTopK;
  run.loss_tokens = model::kLossChunkTokens;
  run.attention_queries = model::kAttentionQueries;
  const at::ScalarType dtype = model::parse_dtype(run.dtype, "train.dtype");
  run.widened_products = ops::product_dtype(dtype) != dtype;
  // Of several chunks all but the one that begins or ends the layer travel beside another's computation.
  run.overlap = 1.0 - 1.0 / static_cast<double>(overlap.chunks);
  run.sequence_length = config.data.sequence_length;
  run.global_batch = config.batch.global_batch;
  run.micro_sequences = config.batch.micro_sequences;
  run.group_sequences = moe::indivisible_sequences(moe, /*training=*/true);
  if (moe.capacity.drop_policy != moe::DropPolicy::kNone)
    run.capacity_rows = moe::expert_capacity(moe, moe.capacity.group_sequences * run.sequence_length);
  return run;
}

plan::ArrowBytes sent_in_arrows(const comm::Ledger& ledger) {
  plan::ArrowBytes bytes;
  for (std::size_t arrow = 0; arrow < bytes.size(); ++arrow) {
    const comm::LedgerEntry entry =
        ledger.sum([&](const comm::LedgerKey& key) { return key.phase == kArrows.at(arrow); });
    bytes.at(arrow) = {.within_nodes = static_cast<double>(entry.bytes_within_nodes),
                       .between_nodes = static_cast<double>(entry.bytes_between_nodes)};
  }
  return bytes;
}

plan::RoutingRecord routing_record(const moe::RoutingKey& key, const at::Tensor& ids_TK,
                                   std::int64_t num_experts) {
  plan::RoutingRecord record;
  record.step = key.step;
  record.micro_step = key.micro_step;
  record.layer = key.layer;
  record.tokens = ids_TK.size(0);
  const auto* ids = ids_TK.const_data_ptr<std::int32_t>();
  record.ids_TK.assign(ids, ids + ids_TK.numel());
  record.counts_E.assign(static_cast<std::size_t>(num_experts), 0);
  for (const std::int32_t id : record.ids_TK) {
    if (id >= 0) ++record.counts_E[static_cast<std::size_t>(id)];
  }
  return record;
}

AuditedTraffic audit_traffic(const plan::OwnRun& run, const plan::RoutingCounts& routing, std::int64_t step,
                             const parallel::Groups& groups) {
  AuditedTraffic audit;
  audit.measured = sent_in_arrows(*groups.ledger);
  if (routing.records.empty()) return audit;
  audit.predicted =
      plan::recorded_step_bytes(run, routing, step).at(static_cast<std::size_t>(groups.dp->rank()));
  audit.imbalance = 0.0;
  for (const plan::RoutingRecord& record : routing.records) {
    audit.imbalance +=
        plan::rank_imbalance(record.counts_E, run.ep) / static_cast<double>(routing.records.size());
  }
  return audit;
}

std::vector<PredictedFigure> compare_run(const RunConfig& config, const plan::OwnRun& run,
                                         const MeasuredRun& measured) {
  // A cluster's file has no rate of float64 products.
  const bool timed = !config.planner.cluster.empty() && config.train.dtype != "float64";
  const plan::Cluster cluster = plan::load_cluster(timed ? config.planner.cluster : kDefaultCluster);
  std::vector<PredictedFigure> figures;
  const double imbalance = measured.traffic.imbalance;
  figures.push_back({"memory of a rank", "bytes", plan::own_memory(run, cluster, imbalance).peak_bytes,
                     measured.memory_bytes});
  PredictedFigure step{"step", "s", std::nullopt, measured.step_s};
  PredictedFigure share{"all_to_all of the step", "share", std::nullopt, measured.all_to_all_share};
  if (timed) {
    const plan::StepTime time = plan::own_step(run, cluster, imbalance);
    step.predicted = time.step_s;
    share.predicted = time.expert_comm_share();
  }
  figures.push_back(step);
  for (std::size_t arrow = 0; arrow < kArrows.size(); ++arrow) {
    figures.push_back({kArrows.at(arrow), "bytes", measured.traffic.predicted.at(arrow).total(),
                       measured.traffic.measured.at(arrow).total()});
  }
  figures.push_back(share);
  return figures;
}

std::string comparison_text(const std::vector<PredictedFigure>& figures) {
  std::string text =
      fmt::format("{:<24}{:>14}{:>14}{:>14}\n", "the planner's", "predicted", "measured", "difference");
  for (const PredictedFigure& figure : figures) {
    text += fmt::format("  {:<22}{:>14}{:>14}{:>14}\n", figure.name,
                        figure.predicted ? figure_text(figure, *figure.predicted) : "-",
                        figure_text(figure, figure.measured), difference_text(figure));
  }
  return text;
}

Json comparison_json(const std::vector<PredictedFigure>& figures) {
  Json json = Json::object();
  for (const PredictedFigure& figure : figures) {
    json[figure.name] = {{"unit", figure.unit},
                         {"predicted", figure.predicted ? Json(*figure.predicted) : Json()},
                         {"measured", figure.measured}};
  }
  return json;
}

}  // namespace collegium::train
