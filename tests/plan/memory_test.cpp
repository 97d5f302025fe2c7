// SPDX-License-Identifier: Apache-2.0
#include "collegium/plan/memory.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "collegium/base/error.h"
#include "collegium/plan/search.h"

namespace collegium::plan {
namespace {

using testing::HasSubstr;

constexpr double kGiB = 1073741824.0;

// A GPT layer of width h on one rank, dropout and kept scores: 34 s b h + 5 a s^2 b bytes [Korthikanti2022,
// Eq 1].
TEST(Memory, activations_of_a_gpt_layer_follow_the_published_formula) {
  const ModelSpec model = load_model("gpt3-175b");
  const Workload work{.seq_len = 2048, .global_batch = 1};
  Layout layout{.micro_batch = 1};
  Stack stack;
  stack.flash_attention = false;
  stack.dropout_mask_bytes = 1.0;
  const double tokens = 2048;
  const double scores = 5.0 * 96 * 2048 * tokens;
  EXPECT_DOUBLE_EQ(layer_activations(model, layout, work, stack).dense, 34.0 * 12288 * tokens + scores);
  layout.tp = 8;
  layout.sequence_parallel = true;
  EXPECT_DOUBLE_EQ(layer_activations(model, layout, work, stack).dense, (34.0 * 12288 * tokens + scores) / 8);
  layout.sequence_parallel = false;
  EXPECT_DOUBLE_EQ(layer_activations(model, layout, work, stack).dense,
                   12288 * tokens * (10.0 + 24.0 / 8) + scores / 8);
}

// Inputs of the four products of a layer: norm, attention, norm, SwiGLU.
TEST(Memory, inputs_of_products_are_as_wide_as_their_format) {
  const ModelSpec model = load_model("llama3-8b");
  const auto bytes = [&](const char* precision) {
    const Workload work{.seq_len = 2048, .global_batch = 1, .precision = precision};
    return layer_activations(model, {}, work, Stack{}).dense / 2048;
  };
  const double inputs = 3.0 * 4096 + 14336;
  EXPECT_DOUBLE_EQ(bytes("fp32") - bytes("bf16"), 2.0 * inputs);
  EXPECT_DOUBLE_EQ(bytes("tf32"), bytes("fp32"));
  EXPECT_DOUBLE_EQ(bytes("bf16") - bytes("fp8"), inputs);
}

double bytes_of(const MemoryReport& report, const std::string& component) {
  for (const MemoryLine& line : report.lines) {
    if (line.component == component) return line.bytes;
  }
  return 0.0;
}

TEST(Memory, padded_blocks_are_as_large_as_the_fullest_ranks) {
  const ModelSpec model = load_model("mixtral-8x7b");
  const auto buffers = [&](Dispatcher dispatcher, double imbalance) {
    const Workload work{.seq_len = 4096, .global_batch = 64, .imbalance = imbalance};
    const Layout layout{.dp = 8, .ep = 8, .dispatcher = dispatcher};
    return bytes_of(stage_memory(model, layout, work, load_cluster("h100-80"), Stack{}, 0),
                    "dispatch buffers");
  };
  // Sent and received: all pairs hold the largest pair's rows.
  EXPECT_DOUBLE_EQ(buffers(Dispatcher::kPadded, 1.5), 2.0 * 1.5 * buffers(Dispatcher::kAllToAll, 1.0));
  EXPECT_DOUBLE_EQ(buffers(Dispatcher::kAllGather, 1.5), buffers(Dispatcher::kAllGather, 1.0));
}

TEST(Memory, weights_of_all_stages_and_ranks_sum_to_the_model) {
  const ModelSpec model = load_model("mixtral-8x7b");
  const Layout layout{.tp = 1, .pp = 4, .dp = 8, .ep = 8};
  double sum = 0.0;
  for (int stage = 0; stage < layout.pp; ++stage) {
    const StageWeights w = stage_weights(model, layout, Stack{}, stage);
    sum += w.dense + w.experts * layout.ep;
  }
  EXPECT_DOUBLE_EQ(sum, 46'702'792'704.0);
}

TEST(Memory, chunks_in_flight_by_schedule) {
  Layout layout{.pp = 4};
  EXPECT_EQ(layers_in_flight(layout, 100, 0, 8), 32);
  EXPECT_EQ(layers_in_flight(layout, 100, 3, 8), 8);
  EXPECT_EQ(layers_in_flight(layout, 2, 0, 8), 16);
  layout.schedule = Schedule::kGPipe;
  EXPECT_EQ(layers_in_flight(layout, 100, 3, 8), 800);
  layout.schedule = Schedule::kInterleaved;
  layout.virtual_stages = 8;
  EXPECT_EQ(layers_in_flight(layout, 100, 3, 8), 29);
  layout.virtual_stages = 1;
  layout.schedule = Schedule::kDualPipe;
  EXPECT_EQ(layers_in_flight(layout, 100, 0, 8) + layers_in_flight(layout, 100, 3, 8), 40);
  EXPECT_EQ(layers_in_flight(layout, 4, 0, 8), 16);
}

// Weights and gradients twice, the optimizer's state once over all ranks; both ends embed and have the head.
TEST(Memory, dualpipe_ranks_hold_two_stages) {
  const ModelSpec model = load_model("deepseek-v3");
  const Workload work{.seq_len = 4096, .global_batch = 256};
  const Cluster cluster = load_cluster("h100-80");
  const auto sum = [&](Schedule schedule, const char* component) {
    const Layout layout{.pp = 8, .dp = 16, .ep = 16, .schedule = schedule};
    double bytes = 0.0;
    for (int stage = 0; stage < layout.pp; ++stage)
      bytes += bytes_of(stage_memory(model, layout, work, cluster, Stack{}, stage), component);
    return bytes;
  };
  for (const char* twice : {"weights", "gradients", "embedded tokens", "logits"})
    EXPECT_NEAR(sum(Schedule::kDualPipe, twice) / sum(Schedule::k1F1B, twice), 2.0, 1e-9) << twice;
  EXPECT_NEAR(sum(Schedule::kDualPipe, "optimizer state") / sum(Schedule::k1F1B, "optimizer state"), 1.0,
              1e-9);
  const Layout layout{.pp = 8, .dp = 16, .ep = 16, .schedule = Schedule::kDualPipe};
  const MemoryReport first = stage_memory(model, layout, work, cluster, Stack{}, 0);
  const MemoryReport last = stage_memory(model, layout, work, cluster, Stack{}, 7);
  EXPECT_DOUBLE_EQ(first.static_bytes, last.static_bytes);
  const LayerActivations acts = layer_activations(model, layout, work, Stack{});
  // 8 layers of stage 0 (3 of them dense) for 8 micro-batches, 7 and the prediction layer of stage 7 for one.
  EXPECT_NEAR(bytes_of(first, "activations of MoE layers"), (8 * 5 + 8) * acts.moe, 1.0);
  EXPECT_NEAR(bytes_of(first, "activations of dense layers"), 8 * 3 * acts.dense, 1.0);
}

TEST(Memory, each_zero_stage_and_each_recompute_mode_needs_less) {
  const ModelSpec model = load_model("qwen3-30b-a3b");
  const Cluster cluster = load_cluster("h100-80");
  const Workload work{.seq_len = 4096, .global_batch = 64};
  double before = 1e300;
  for (const Zero zero : {Zero::kNone, Zero::kOptimizer, Zero::kGradients}) {
    const Layout layout{.dp = 16, .ep = 4, .zero = zero};
    const double bytes = stage_memory(model, layout, work, cluster, Stack{}, 0).static_bytes;
    EXPECT_LT(bytes, before);
    before = bytes;
  }
  before = 1e300;
  for (const Recompute& recompute :
       {Recompute{}, Recompute{.norms = true, .activation = true}, Recompute{.full = true}}) {
    const Layout layout{.dp = 16, .ep = 4, .recompute = recompute};
    const double bytes = stage_memory(model, layout, work, cluster, Stack{}, 0).peak_bytes;
    EXPECT_LT(bytes, before);
    before = bytes;
  }
}

TEST(Memory, grows_with_the_micro_batch_and_with_imbalance) {
  const ModelSpec model = load_model("mixtral-8x7b");
  const Cluster cluster = load_cluster("h100-80");
  const auto peak = [&](int micro, double imbalance) {
    const Layout layout{.pp = 4, .dp = 8, .ep = 8, .micro_batch = micro};
    const Workload work{.seq_len = 4096, .global_batch = 64, .imbalance = imbalance};
    return worst_memory(model, layout, work, cluster, Stack{}).peak_bytes;
  };
  EXPECT_LT(peak(1, 1.0), peak(2, 1.0));
  EXPECT_LT(peak(1, 1.0), peak(1, 1.5));
}

TEST(Memory, more_memory_never_makes_less_fit) {
  const ModelSpec model = load_model("mixtral-8x7b");
  const Workload work{.seq_len = 4096, .global_batch = 256};
  Cluster cluster = load_cluster("h100-80");
  std::size_t before = 0;
  for (const double gib : {20.0, 40.0, 80.0, 160.0, 320.0}) {
    cluster.accelerator.memory_gib = gib;
    const SearchResult found = search(model, work, cluster, Stack{}, {.accelerators = 64});
    EXPECT_GE(found.fitting, before);
    before = found.fitting;
  }
  EXPECT_GT(before, 0U);
}

TEST(Layout, names_are_read_back) {
  const Layout layout = parse_layout("tp2.pp4.vp2.dp8.ep4.etp2.zero2.mb3.full.hier.interleaved");
  EXPECT_EQ(layout.tp, 2);
  EXPECT_EQ(layout.etp, 2);
  EXPECT_EQ(layout.expert_dp(), 2);
  EXPECT_EQ(layout_name(parse_layout(layout_name(layout))), layout_name(layout));
  EXPECT_EQ(parse_layout("pp4.vp2").schedule, Schedule::kInterleaved);
  EXPECT_EQ(parse_layout("pp4.vp2.gpipe").schedule, Schedule::kGPipe);
}

TEST(Layout, impossible_ones_name_the_rule_and_the_other_number) {
  const ModelSpec model = load_model("mixtral-8x7b");
  const Workload work{.seq_len = 4096, .global_batch = 64};
  EXPECT_THAT(forbidden(model, {.tp = 3}, work).value(),
              HasSubstr("tp = 3 must divide the number of heads = 32"));
  EXPECT_THAT(forbidden(model, {.dp = 8, .ep = 16}, work).value(),
              HasSubstr("ep = 16 must divide the number of experts = 8"));
  EXPECT_THAT(forbidden(model, {.dp = 2, .ep = 8}, work).value(),
              HasSubstr("must divide dp*cp*tp = 2*1*1 = 2"));
  EXPECT_THAT(forbidden(model, {.dp = 24, .ep = 8}, work).value(),
              HasSubstr("must divide the global batch = 64"));
  EXPECT_THAT(forbidden(load_model("llama3-8b"), {.dp = 8, .ep = 8}, work).value(),
              HasSubstr("has no experts"));
  EXPECT_THAT(forbidden(model, parse_layout("pp4.vp2.zb"), work).value(),
              HasSubstr("virtual stages = 2: only the interleaved schedule has them, zb has not"));
  EXPECT_FALSE(forbidden(model, parse_layout("pp4.vp2"), work).has_value());
  ModelSpec uneven = load_model("llama3-8b");
  uneven.heads = 40;
  uneven.kv_heads = 10;
  EXPECT_THAT(forbidden(uneven, {.tp = 4}, work).value(),
              HasSubstr("tp = 4 must divide the number of key/value heads = 10"));
  EXPECT_FALSE(forbidden(uneven, {.tp = 2}, work).has_value());
  EXPECT_THROW(parse_layout("tp2.what"), ConfigError);
  for (const char* twice : {"tp2.tp4", "tp2.dp2.tp2", "zero1.zero2", "full.none", "1f1b.gpipe", "a2a.hier"})
    EXPECT_THROW(parse_layout(twice), ConfigError) << twice;
}

TEST(Layout, no_product_of_sizes_overflows) {
  const ModelSpec model = load_model("llama3-8b");
  EXPECT_THAT(forbidden(model, parse_layout("pp65536.vp65536"), {.global_batch = 64}).value(),
              HasSubstr("65536*65536 = 4294967296 exceeds the 32 layers"));
  EXPECT_THAT(forbidden(load_model("mixtral-8x7b"), parse_layout("dp8.ep8.etp7168"), {}).value(),
              HasSubstr("ep*etp = 8*7168"));
  EXPECT_EQ(parse_layout("dp1048576").world(), kMostAccelerators);
  try {
    parse_layout("tp2.cp2048.dp1048576");
    FAIL();
  } catch (const ConfigError& error) {
    EXPECT_THAT(error.what(), HasSubstr("2*2048*1*1048576 = 4294967296 ranks: at most 1048576"));
  }
}

TEST(Layout, every_recompute_is_named) {
  EXPECT_TRUE(parse_recompute("selective:operators").operators);
  try {
    parse_recompute("nothing");
    FAIL();
  } catch (const ConfigError& error) {
    for (const char* part : {"full", "core_attn", "norms", "mla_up", "moe_act", "mlp", "moe", "operators"})
      EXPECT_THAT(error.what(), HasSubstr(part));
  }
}

TEST(Cluster, bad_files_name_field_and_value) {
  const auto message = [](const std::string& text) -> std::string {
    try {
      parse_cluster(text, "c.toml");
    } catch (const ConfigError& error) {
      return error.what();
    }
    return "no error";
  };
  const std::string good = cluster_toml(load_cluster("h100-80"));
  EXPECT_EQ(message(good), "no error");
  std::string bad = good;
  bad.replace(bad.find("gb_per_s = 450"), std::string("gb_per_s = 450").size(), "gb_per_s = nan");
  EXPECT_THAT(message(bad), HasSubstr("fast_link.gb_per_s"));
  EXPECT_THAT(message("speed = 3"), HasSubstr("speed"));
  EXPECT_THROW(load_cluster("h100-81"), ConfigError);
}

TEST(Cluster, is_read_back_as_it_was_written) {
  for (const std::string& name : cluster_names()) {
    const Cluster cluster = load_cluster(name);
    EXPECT_EQ(parse_cluster(cluster_toml(cluster), name), cluster) << name;
  }
  Cluster cpu = load_cluster("a100-80");
  cpu.note = "a \"measured\" machine\nof two cores";
  cpu.cores_per_rank = 1;
  cpu.accelerator.gemm_falloff["bf16"] = {.rows = 1.0 / 3.0, .columns = 1e-9, .depth = 123456789.125};
  cpu.fast_link.all_to_all_gb_per_s = 0.1;
  EXPECT_EQ(parse_cluster(cluster_toml(cpu), "cpu"), cpu);
}

TEST(Memory, a_token_of_a_known_run_is_where_it_was_measured) {
  // A dense 7B model, tp 4, pp 1 on 8 accelerators: 19.24 GiB before the first step, 53.2 GiB at the peak.
  ModelSpec model;
  model.vocab = 131073;
  model.hidden = 4096;
  model.layers = 32;
  model.heads = 32;
  model.kv_heads = 8;
  model.dense_ffn = 16384;
  model.gated_ffn = false;
  complete(model, "7b");
  const Layout layout{.tp = 4, .dp = 2, .micro_batch = 2, .sequence_parallel = false};
  const Workload work{.seq_len = 8192, .global_batch = 8};
  Stack stack;
  stack.dropout_mask_bytes = 1.0;
  const MemoryReport report = stage_memory(model, layout, work, load_cluster("h100-80"), stack, 0);
  EXPECT_NEAR(report.static_bytes / kGiB, 19.24, 0.03 * 19.24);
  EXPECT_NEAR(report.peak_bytes / kGiB, 53.2, 0.05 * 53.2);
}

}  // namespace
}  // namespace collegium::plan
