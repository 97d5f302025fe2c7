// SPDX-License-Identifier: Apache-2.0
#include "collegium/plan/published.h"

#include <algorithm>
#include <cmath>

#include "collegium/base/error.h"
#include "collegium/base/text.h"
#include "collegium/base/units.h"
#include "collegium/plan/memory.h"

namespace collegium::plan {

namespace {

// No published run comes near these; more would only make the planner count for ever.
constexpr std::int64_t kMostLayers = 10000;
constexpr std::int64_t kMostWidth = 100000000;
constexpr std::int64_t kMostExperts = 100000;
constexpr std::int64_t kMostRanks = 10000000;

std::int64_t whole(const CsvRow& row, const std::string& column, std::int64_t most) {
  const double value = required(row, column);
  require_config(value == std::floor(value), "{} = {}: must be a whole number", column, value);
  require_config(value <= static_cast<double>(most), "{} = {}: must be at most {}", column, value, most);
  return static_cast<std::int64_t>(value);
}

std::int64_t whole_or(const CsvRow& row, const std::string& column, std::int64_t most,
                      std::int64_t otherwise) {
  return row.text(column).empty() ? otherwise : whole(row, column, most);
}

int size_or_one(const CsvRow& row, const std::string& column) {
  return static_cast<int>(whole_or(row, column, kMostRanks, 1));
}

// Vocabularies that rows leave open, by the family that the row's name gives away.
std::int64_t vocabulary(const CsvRow& row, PublishedRun& run) {
  if (!row.text("vocab").empty()) return whole(row, "vocab", kMostWidth);
  std::int64_t assumed = 50257;
  const std::string name = lower_case(row.text("name"));
  if (contains(name, "deepseekv3") || contains(name, "deepseek-v3")) assumed = 129280;
  if (contains(name, "mixtral")) assumed = 32000;
  if (contains(name, "llama")) assumed = 128256;
  if (contains(name, "qwen3")) assumed = 151936;
  run.assumptions.push_back(fmt::format("vocabulary {} (not in the row)", assumed));
  return assumed;
}

// Test-size models keep the classical default, tied embeddings.
constexpr std::int64_t kTestWidth = 1024;

void read_experts(const CsvRow& row, PublishedRun& run) {
  ModelSpec& m = run.model;
  if (row.number("experts").value_or(0.0) == 0.0) return;
  m.experts = whole(row, "experts", kMostExperts);
  m.top_k = whole(row, "topk", kMostExperts);
  const bool open = row.text("moe_ffn_hidden").empty();
  m.expert_ffn = whole(row, open ? "ffn_hidden" : "moe_ffn_hidden", kMostWidth);
  if (open) run.assumptions.push_back(fmt::format("experts of width {} (ffn_hidden)", m.expert_ffn));
  // Half a shared expert is one of half the width.
  const double shared = row.number("shared_experts").value_or(0.0);
  require_config(shared >= 0.0 && shared <= static_cast<double>(m.experts),
                 "shared_experts = {}: must be between 0 and experts = {}", shared, m.experts);
  m.shared_ffn = std::llround(shared * static_cast<double>(m.expert_ffn));
}

// What sizes do not say: latent attention, prediction layers, dense first layers, windows.
void read_architecture(const CsvRow& row, PublishedRun& run) {
  ModelSpec& m = run.model;
  const std::string& name = row.text("name");
  const bool deepseek = contains(name, "DeepSeekV3") || contains(name, "deepseek-v3") ||
                        contains(name, "deepseekv3") || contains(name, "Kimi") || contains(name, "kimi");
  if (deepseek || contains(run.source, "MLA")) {
    const bool wide = m.hidden >= 4096;
    m.latent = {.q_rank = wide ? 1536 : 0, .kv_rank = 512, .nope_dim = 128, .rope_dim = 64, .value_dim = 128};
    m.head_dim = 192;
  }
  if (deepseek && m.layers == 61) {
    const bool kimi = m.experts == 384;
    m.moe_layers.assign(61, true);
    std::fill_n(m.moe_layers.begin(), kimi ? 1 : 3, false);
    m.mtp_layers = kimi ? 0 : 1;
    m.routing_groups = kimi ? 0 : 8;
    m.routing_top_groups = kimi ? 0 : 4;
  }
  if (contains(run.source, "MTP=1")) m.mtp_layers = 1;
  if (contains(name, "Qwen3") || contains(name, "qwen3")) {
    m.head_dim = 128;
    m.qk_norm = SpecQkNorm::kPerHead;
  }
  if (contains(name, "GPT OSS") || contains(name, "gpt-oss")) {
    m.head_dim = 64;
    m.window = 128;
    m.attention_sinks = true;
    for (std::int64_t i = 0; i < m.layers; ++i) m.window_layers.push_back(i % 2 == 0);
  }
}

// What the golden runs' configurations say beside their sizes.
void read_test(const CsvRow& row, PublishedRun& run) {
  ModelSpec& m = run.model;
  const std::string& name = row.text("name");
  if (contains(name, "mixtral_8x7b_alltoall")) {
    m.vocab = 256000;
    run.assumptions.back() = "vocabulary 256000 (its configuration's tokenizer)";
  }
  // A gated network without a width of its own gets 8/3 of the hidden size, in blocks of 64.
  if (m.is_moe() && m.gated_ffn && m.expert_ffn == 4 * m.hidden) {
    m.expert_ffn = m.hidden * 8 / 3 / 64 * 64;
    run.assumptions.push_back(
        fmt::format("experts of width {} (the software's default when gated)", m.expert_ffn));
  }
  run.stack.grouped_experts = contains(name, "groupedGEMM") || !contains(name, "experts2parallel");
  if (contains(name, "multi_dist_optimizer_instances")) run.stack.optimizer_instances = 2;
}

void read_model(const CsvRow& row, PublishedRun& run) {
  require_config(!contains(run.source, "hybrid arch"),
                 "hybrid architecture: not a transformer of attention and networks alone");
  require_config(!contains(row.text("name"), "tokendrop"),
                 "routing that drops tokens by an unstated capacity: the work of a step is unknown");
  ModelSpec& m = run.model;
  m.name = row.text("name");
  m.family = "published run";
  m.layers = whole(row, "layers", kMostLayers);
  m.hidden = whole(row, "hidden", kMostWidth);
  m.heads = whole(row, "heads", m.hidden);
  m.kv_heads = whole_or(row, "kv_heads", m.heads, m.heads);
  read_experts(row, run);
  m.dense_ffn = whole_or(row, "ffn_hidden", kMostWidth, 4 * m.hidden);
  m.vocab = vocabulary(row, run);
  m.gated_ffn = contains(run.source, "non-gated") ? false : (m.is_moe() || m.dense_ffn != 4 * m.hidden);
  if (!m.gated_ffn) {
    m.norm = SpecNorm::kLayer;
    m.qkv_bias = m.attention_output_bias = m.ffn_bias = !contains(run.source, "llm-foundry");
  }
  // Classical GPT models tie input and output embeddings; runs of Megatron Core and all gated models do not.
  const bool core = contains(run.source, "functional_tests") || contains(run.source, "model_table");
  m.tied_embeddings = core ? m.hidden <= kTestWidth : !m.gated_ffn;
  if (contains(run.source, "functional_tests")) read_test(row, run);
  read_architecture(row, run);
  complete(m, m.name);
}

void read_zero(const CsvRow& row, Layout& l) {
  const std::string& zero = row.text("zero");
  if (zero.empty() || zero == "0" || zero == "none" || zero == "ddp") {
    l.zero = Zero::kNone;
  } else if (zero == "1") {
    l.zero = Zero::kOptimizer;
  } else if (zero == "2" || zero == "fsdp-SHARD_GRAD_OP") {
    l.zero = Zero::kGradients;
  } else if (zero == "3" || contains(zero, "fsdp")) {
    l.zero = Zero::kSharded;
  } else {
    throw ConfigError(fmt::format("zero = {}: must be 0, 1, 2, 3, ddp or fsdp", zero));
  }
}

void read_world(const CsvRow& row, PublishedRun& run) {
  Layout& l = run.layout;
  l.tp = size_or_one(row, "tp");
  l.pp = size_or_one(row, "pp");
  l.cp = size_or_one(row, "cp");
  l.virtual_stages = size_or_one(row, "vpp");
  l.ep = size_or_one(row, "ep");
  l.etp = size_or_one(row, "etp");
  if (!run.model.is_moe()) l.ep = l.etp = 1;
  const std::int64_t stage = static_cast<std::int64_t>(l.tp) * l.pp * l.cp;
  require_config(
      stage <= kMostRanks && l.pp * static_cast<std::int64_t>(l.virtual_stages) <= 2 * run.model.layers,
      "pp*vpp = {}*{}: there are {} layers", l.pp, l.virtual_stages, run.model.layers);
  if (!row.text("num_gpus").empty()) {
    const int world = static_cast<int>(whole(row, "num_gpus", kMostRanks));
    // Where every rank is data parallel nothing is left open.
    const bool data_parallel = size_or_one(row, "dp") == world || l.zero == Zero::kSharded;
    require_config(data_parallel || (!row.text("tp").empty() && !row.text("pp").empty()),
                   "tp and pp are missing");
    require_config(world % stage == 0, "num_gpus = {} must be a multiple of tp*pp*cp = {}", world, stage);
    l.dp = static_cast<int>(world / stage);
    const std::int64_t dp = whole_or(row, "dp", kMostRanks, l.dp);
    require_config(dp == l.dp, "dp = {} contradicts num_gpus/(tp*pp*cp) = {}/{} = {}", dp, world, stage,
                   l.dp);
  } else if (!row.text("dp").empty()) {
    l.dp = size_or_one(row, "dp");
  } else {
    throw ConfigError("num_gpus is missing: optimizer state is sharded over an unknown number of ranks");
  }
  const std::int64_t stage_ranks = static_cast<std::int64_t>(l.dp) * l.cp * l.tp;
  require_config(stage_ranks * l.pp <= kMostRanks, "tp*pp*cp*dp = {} ranks: more than {}", stage_ranks * l.pp,
                 kMostRanks);
  require_config(stage_ranks % (static_cast<std::int64_t>(l.ep) * l.etp) == 0,
                 "ep*etp = {}*{} must divide dp*cp*tp = {}", l.ep, l.etp, stage_ranks);
}

// What a run's name says of its dispatcher and of the exchange's overlap.
void read_dispatcher(const CsvRow& row, PublishedRun& run) {
  if (!run.model.is_moe()) return;
  const std::string& name = row.text("name");
  if (contains(run.source, "Bridge") || contains(name, "HybridEP") || contains(name, "DeepEP"))
    run.layout.dispatcher = Dispatcher::kHierarchical;
  if (contains(name, "alltoall")) run.layout.dispatcher = Dispatcher::kAllToAll;
  if (contains(name, "alltoall") || contains(name, "overlap off")) run.stack.expert_overlap = 0.0;
  if (contains(name, "EP-overlap")) run.stack.expert_overlap = 0.9;
}

void read_layout(const CsvRow& row, PublishedRun& run) {
  Layout& l = run.layout;
  read_zero(row, l);
  read_world(row, run);
  const std::string& recompute = row.text("recompute");
  l.recompute = parse_recompute(recompute);
  run.recompute_open = recompute.empty();
  if (recompute.empty() && (contains(run.source, "tables.tex") || run.metric == Metric::kHardwareFlops)) {
    l.recompute.full = true;
    run.assumptions.emplace_back("full recomputation (the row does not say; its stack had no other)");
  }
  if (contains(run.source, "torchtitan")) {
    if (recompute == "selective") l.recompute = {.operators = true};
    run.stack.fused_elementwise = contains(row.text("name"), "compile") || l.tp > 1;
    if (contains(row.text("name"), "AsyncTP")) run.stack.tensor_overlap = 0.7;
  }
  const bool modern = contains(run.source, "Bridge") || contains(run.source, "torchtitan") ||
                      contains(run.source, "model_table") || run.model.is_moe();
  l.sequence_parallel = l.tp > 1 && (modern || contains(recompute, "+SP"));
  l.schedule = l.virtual_stages > 1 ? Schedule::kInterleaved : Schedule::k1F1B;
  if (!row.text("micro_batch").empty()) {
    l.micro_batch = static_cast<int>(whole(row, "micro_batch", kMostExperts));
  } else {
    l.micro_batch =
        contains(run.source, "tables.tex") ? std::max(1, static_cast<int>(run.work.global_batch) / l.dp) : 1;
    run.assumptions.push_back(fmt::format("micro-batch of {} (not in the row)", l.micro_batch));
  }
  read_dispatcher(row, run);
}

// A run whose weights and gradients alone exceed the memory cannot have kept them whole, whatever its column
// says.
void mend_zero(PublishedRun& run) {
  Layout& l = run.layout;
  if (run.metric == Metric::kOutOfMemory || l.zero == Zero::kSharded || l.dp == 1) return;
  const StageWeights w = stage_weights(run.model, l, run.stack, 0);
  const double gradients = l.zero == Zero::kGradients ? 0.0 : run.stack.gradient_bytes;
  const double whole = (w.dense + w.experts) * (run.stack.weight_bytes + gradients);
  // Nothing trains in the last twentieth: optimizer state and activations need some.
  if (whole <= 0.95 * run.cluster.accelerator.memory_gib * kGiB) return;
  run.assumptions.push_back(fmt::format(
      "fully sharded: weights and gradients kept whole, as zero = {} says, would take {:.0f} of {:.0f} GiB",
      static_cast<int>(l.zero), whole / kGiB, run.cluster.accelerator.memory_gib));
  run.contradiction = run.assumptions.back();
  l.zero = Zero::kSharded;
}

}  // namespace

PublishedRun published_run(const CsvRow& row) {
  PublishedRun run;
  run.place = row.place;
  run.name = row.text("name");
  run.source = row.text("source");
  require_config(row.defect.empty(), "{}", row.defect);
  read_figure(row, run);
  read_precision(row, run);
  run.stack = stack_of(run.source, run.work.precision);
  run.cluster = load_cluster(cluster_of(row.text("gpu"), run.source));
  read_model(row, run);
  run.work.seq_len = static_cast<double>(whole(row, "seq_len", kMostWidth));
  run.work.global_batch = static_cast<double>(whole(row, "global_batch", kMostWidth));
  read_layout(row, run);
  mend_zero(run);
  if (contains(run.source, "last rank")) run.stage = run.layout.pp - 1;
  for (const auto& [column, text] : row.fields) {
    if (column != "metric" && column != "value" && column != "unit" && column != "source" &&
        column != "read_or_memory") {
      run.key.append(text).append("|");
      if (column != "name") run.layout_key.append(text).append("|");
    }
  }
  run.key.append(run.stack.name);
  run.layout_key.append(run.source.substr(0, run.source.find('@')));
  return run;
}

}  // namespace collegium::plan
