// SPDX-License-Identifier: Apache-2.0
#pragma once

// How a training run is laid out over ranks, what it trains on, and which habits its software has.

#include <optional>
#include <string>

#include "collegium/plan/model_spec.h"

namespace collegium::plan {

/// kSharded is data parallelism that gathers every layer's weights when it needs them (ZeRO-3, FSDP).
enum class Zero { kNone, kOptimizer, kGradients, kSharded };
/// Who exchanges tokens with experts, and how. kAllToAll: a row per (token, expert); kDeduplicated: a row per
/// (token, rank); kHierarchical: a row per (token, node) over slow links, then one per (token, rank) inside;
/// kPadded: every pair of ranks sends the largest pair's rows; kAllGather: every rank gets every token;
/// kSharedMemory: kAllToAll between domains; ranks of one domain read each other's rows where they lie.
enum class Dispatcher { kAllToAll, kDeduplicated, kHierarchical, kPadded, kAllGather, kSharedMemory };
enum class Schedule { kGPipe, k1F1B, kInterleaved, kZeroBubble, kDualPipe };

/// What the backward pass computes again instead of keeping.
struct Recompute {
  bool full = false;            ///< whole layers: only their inputs are kept
  bool attention_core = false;  ///< scores, softmax and their product with the values
  bool norms = false;
  bool latent_up = false;   ///< up-projections of latent attention
  bool activation = false;  ///< SwiGLU of the experts
  bool dense_ffn = false;   ///< the dense layers' networks
  bool moe = false;         ///< whole MoE blocks
  bool operators = false;   ///< norms and the activations of every network, operator by operator
  bool operator==(const Recompute&) const = default;
};

/// Of a layout that a user writes, and of a search.
constexpr int kMostAccelerators = 1 << 20;

struct Layout {
  int tp = 1;
  int cp = 1;
  int pp = 1;
  int virtual_stages = 1;
  int dp = 1;
  int ep = 1;
  int etp = 1;
  Zero zero = Zero::kOptimizer;
  int micro_batch = 1;  ///< sequences
  Recompute recompute{};
  Dispatcher dispatcher = Dispatcher::kAllToAll;
  Schedule schedule = Schedule::k1F1B;
  bool sequence_parallel = true;  ///< norms and residuals split over tp

  int world() const { return tp * cp * pp * dp; }
  int expert_dp() const { return dp * cp * tp / (ep * etp); }
  /// Ranks of a pipeline that hold a stage: DualPipe's micro-batches enter at both ends, so rank s holds
  /// stages s and pp - 1 - s.
  int stage_copies() const { return schedule == Schedule::kDualPipe && pp > 1 ? 2 : 1; }
  /// Ranks that hold the same dense weights, and the same experts.
  int replicas() const { return dp * cp * stage_copies(); }
  int expert_replicas() const { return expert_dp() * stage_copies(); }
};

struct Workload {
  double seq_len = 4096;
  double global_batch = 256;  ///< sequences of an optimizer step
  std::string precision = "bf16";
  double imbalance = 1.0;  ///< tokens of the fullest rank over the mean; 1 = forced balance
};

/// Habits of a training stack that change memory or time. Facts about software, not fitted figures.
struct Stack {
  std::string name = "collegium";
  std::string family = "collegium";  ///< software whose efficiency is one constant per accelerator
  bool flash_attention = true;
  bool fused_elementwise = true;     ///< norms, activations and dropout in few passes over memory
  double dropout_mask_bytes = 0.0;   ///< 1 when masks of dropout are kept
  double weight_bytes = 2.0;         ///< low-precision weights
  double gradient_bytes = 4.0;       ///< accumulated gradients
  double optimizer_bytes = 12.0;     ///< master weight and two moments
  double reduce_bytes = 4.0;         ///< what the gradient reduction sends per parameter
  bool split_pipeline_sends = true;  ///< tensor-parallel ranks send a part each and gather it inside the node
  double value_scale = 1.0;          ///< width of an activation over the 16 bits that passes and rows count
  bool fused_accumulation = true;    ///< products add to the gradients themselves, without a pass over memory
  bool balanced_stages = false;      ///< stages hold equal work, embedding and head counted as layers
  double fragmentation = 0.03;       ///< cached but unusable share of what the allocator handed out
  double bucket_bytes = 0.0;         ///< buffers of gradient reduction and weight gathering
  bool keeps_stage_edges =
      false;                  ///< pipeline buffers keep a stage's input and output, for one micro-batch more
  double data_overlap = 0.5;  ///< share of the gradient reduction hidden behind the backward pass
  double tensor_overlap = 0.0;   ///< share of tensor-parallel collectives hidden behind GEMMs
  double expert_overlap = 0.0;   ///< share of dispatch and combine hidden behind computation
  double sharded_overlap = 0.9;  ///< share of computation that can hide gathers of sharded weights
  bool never_fitted = false;     ///< its step times are judged with the accelerator's own efficiency
  bool fused_sinks = true;       ///< fused attention knows attention sinks (gpt-oss)
  bool batched_experts =
      true;  ///< experts share one launch; else one product after the other, each with its own tail
  bool one_ring_gathers = false;  ///< sharded weights travel over one ring, which uses one link of a machine
  bool causal_skip = true;        ///< attention computes no score above the diagonal
  double attention_share = 1.0;   ///< what its fused attention reaches of what the accelerator's best reaches
  bool arranges_stages = false;  ///< stages are arranged by work, embedding and head counted, in whole layers
  bool grouped_experts = true;   ///< products of experts are grouped, with workspaces of their own
  int optimizer_instances = 1;   ///< whole copies of the sharded optimizer state over the data-parallel ranks
  double blocked_host_s =
      0.0;  ///< host time of a layer's forward pass that nothing hides: launches wait for kernels
};

/// What     Checks what a user gives.
/// Throws   ConfigError: positions or sequences that are no whole number from 1 to a billion, an imbalance
///          below 1 or not finite. `prefix` is put before the field: "--".
void check_workload(const Workload& work, const std::string& prefix);

/// What     Micro-batches of one pipeline in an optimizer step: global_batch / (dp * micro_batch), rounded
///          up.
double num_micro_batches(const Layout& layout, const Workload& work);

/// What     Why this layout is impossible, or nothing: a rule with both numbers.
std::optional<std::string> forbidden(const ModelSpec& model, const Layout& layout, const Workload& work);

/// What     "tp2.cp1.pp4.vp1.dp8.ep8.etp1.zero1.mb1.none.a2a.1f1b", and back; parts may be left out. With
///          virtual stages 1f1b is read as interleaved.
/// Throws   ConfigError naming the part that cannot be read, or more than kMostAccelerators ranks.
std::string layout_name(const Layout& layout);
Layout parse_layout(const std::string& text);
/// What     "none", "full", or the parts: "core_attn+norms".
std::string recompute_name(const Recompute& recompute);
/// What     Reads none, full, selective:core_attn+... as published runs write it; `+SP` is not a recompute
///          and skipped.
Recompute parse_recompute(const std::string& text);

}  // namespace collegium::plan

namespace collegium {
template <>
struct EnumNames<plan::Dispatcher> {
  static constexpr std::pair<std::string_view, plan::Dispatcher> names[] = {
      {"a2a", plan::Dispatcher::kAllToAll},        {"dedup", plan::Dispatcher::kDeduplicated},
      {"hier", plan::Dispatcher::kHierarchical},   {"padded", plan::Dispatcher::kPadded},
      {"allgather", plan::Dispatcher::kAllGather}, {"shared", plan::Dispatcher::kSharedMemory}};
};
template <>
struct EnumNames<plan::Schedule> {
  static constexpr std::pair<std::string_view, plan::Schedule> names[] = {
      {"gpipe", plan::Schedule::kGPipe},
      {"1f1b", plan::Schedule::k1F1B},
      {"interleaved", plan::Schedule::kInterleaved},
      {"zb", plan::Schedule::kZeroBubble},
      {"dualpipe", plan::Schedule::kDualPipe}};
};
}  // namespace collegium
