// SPDX-License-Identifier: Apache-2.0
#include "collegium/plan/own_run.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <numeric>

#include "collegium/base/error.h"
#include "collegium/base/rng.h"

namespace collegium::plan {
namespace {

OwnRun small_run(Exchange exchange, int ranks, int ep) {
  OwnRun run;
  run.model = load_model("olmoe-1b-7b");
  run.model.hidden = 8;
  run.model.experts = 6;
  run.model.top_k = 2;
  run.ranks = ranks;
  run.ep = ep;
  run.exchange = exchange;
  run.sequence_length = 4;
  return run;
}

// Two ranks, three experts each; rank 0 has tokens (0,3) and (4,5), rank 1 has token (0,1).
std::vector<ArrowBytes> of_example(const OwnRun& run) {
  const std::vector<std::int32_t> first = {0, 3, 4, 5};
  const std::vector<std::int32_t> second = {0, 1};
  return layer_bytes(run, {first, second});
}

constexpr double kRow = 16.0;  // 8 x bfloat16
constexpr double kWeight = 4.0;

TEST(OwnRun, bytes_of_each_exchange_counted_by_hand) {
  OwnRun run = small_run(Exchange::kUneven, 2, 2);
  std::vector<ArrowBytes> bytes = of_example(run);
  EXPECT_EQ(bytes[0][0].within_nodes, 3 * (kRow + kWeight));
  EXPECT_EQ(bytes[1][0].within_nodes, 2 * (kRow + kWeight));
  EXPECT_EQ(bytes[0][1].within_nodes, 2 * kRow);
  EXPECT_EQ(bytes[1][1].within_nodes, 3 * kRow);
  EXPECT_EQ(bytes[0][2].within_nodes, 3 * kRow);
  EXPECT_EQ(bytes[1][3].within_nodes, 3 * (kRow + kWeight));
  EXPECT_EQ(bytes[0][0].between_nodes, 0);
  // The largest count of an expert is 1: a block of one row for each of the other's three experts.
  run.exchange = Exchange::kPadded;
  bytes = of_example(run);
  EXPECT_EQ(bytes[0][0].within_nodes, 3 * (kRow + kWeight));
  EXPECT_EQ(bytes[1][0].within_nodes, 3 * (kRow + kWeight));
  run.exchange = Exchange::kAllgather;
  run.combine_fp32 = true;
  bytes = of_example(run);
  EXPECT_EQ(bytes[0][0].within_nodes, 2 * kRow + 4 * kWeight);
  EXPECT_EQ(bytes[1][1].within_nodes, 2 * 2 * kRow);
  // One copy of each of rank 0's tokens, with one and two pairs.
  run.exchange = Exchange::kTwoLevel;
  run.combine_fp32 = false;
  bytes = of_example(run);
  EXPECT_EQ(bytes[0][0].within_nodes, 2 * kRow + 3 * kWeight);
  EXPECT_EQ(bytes[1][0].within_nodes, kRow + 2 * kWeight);
  run.node_of_rank = {0, 1};
  EXPECT_EQ(of_example(run)[0][0].between_nodes, 2 * kRow + 3 * kWeight);
  // A number for rows and one for weights, of every chunk.
  run.exchange = Exchange::kSharedMemory;
  EXPECT_THROW(of_example(run), ConfigError);
  run.node_of_rank = {0, 0};
  run.chunks = 3;
  bytes = of_example(run);
  EXPECT_EQ(bytes[0][0].within_nodes, 3 * 16);
  EXPECT_EQ(bytes[1][1].within_nodes, 3 * 8);
}

std::vector<std::int32_t> random_ids(const ModelSpec& m, std::int64_t tokens) {
  const RandomStream random(1, "test", 0);
  std::vector<std::int32_t> ids;
  for (std::int64_t t = 0; t < tokens; ++t) {
    std::vector<std::pair<double, std::int32_t>> order;
    for (std::int32_t e = 0; e < m.experts; ++e)
      order.emplace_back(random.normal(static_cast<std::uint64_t>(t * m.experts + e)), e);
    std::sort(order.begin(), order.end());
    for (std::int64_t k = 0; k < m.top_k; ++k) ids.push_back(order[static_cast<std::size_t>(k)].second);
  }
  return ids;
}

RoutingCounts recorded(const OwnRun& run) {
  RoutingCounts all{.experts = run.model.experts, .top_k = run.model.top_k, .records = {}};
  for (std::int64_t layer = 0; layer < run.model.num_moe_layers(); ++layer) {
    RoutingRecord record;
    record.step = 1;
    record.layer = layer;
    record.tokens = run.global_batch * run.sequence_length;
    record.ids_TK = random_ids(run.model, record.tokens);
    all.records.push_back(std::move(record));
  }
  return all;
}

double sum(const std::vector<ArrowBytes>& ranks) {
  double bytes = 0.0;
  for (const ArrowBytes& arrows : ranks) {
    for (const SentBytes& sent : arrows) bytes += sent.total();
  }
  return bytes;
}

TEST(OwnRun, expectation_lies_near_the_bytes_of_a_random_routing) {
  for (const Exchange exchange :
       {Exchange::kUneven, Exchange::kAllgather, Exchange::kTwoLevel, Exchange::kSharedMemory}) {
    for (const int ep : {1, 2, 4}) {
      OwnRun run = small_run(exchange, 4, ep);
      if (exchange != Exchange::kSharedMemory) run.node_of_rank = {0, 0, 1, 1};
      run.sequence_length = 512;
      run.micro_sequences = run.global_batch = 6;  // 2, 2, 1 and 1 sequences
      const double exact = sum(recorded_step_bytes(run, recorded(run), 1));
      EXPECT_NEAR(sum(expected_step_bytes(run)), exact, 0.02 * exact) << enum_name(exchange) << " ep " << ep;
      EXPECT_EQ(exact == 0.0, ep == 1);
    }
  }
}

TEST(OwnRun, shared_memory_keeps_a_copy_of_each_token_where_uneven_keeps_rows) {
  constexpr double kImbalance = 1.25;
  OwnRun run = small_run(Exchange::kUneven, 2, 2);
  const double uneven = own_activations(run, kImbalance).layers;
  run.exchange = Exchange::kSharedMemory;
  const double fewer_rows = static_cast<double>(run.model.top_k) * kImbalance - 1.0;
  EXPECT_DOUBLE_EQ(uneven - own_activations(run, kImbalance).layers,
                   static_cast<double>(run.model.num_moe_layers()) * fewer_rows * kRow);
}

TEST(OwnRun, order_of_the_exchanges_and_of_recomputation) {
  OwnRun run = small_run(Exchange::kUneven, 4, 4);
  run.sequence_length = 64;
  const RoutingCounts routing = recorded(run);
  const double uneven = sum(recorded_step_bytes(run, routing, 1));
  run.recompute = true;
  EXPECT_GT(sum(recorded_step_bytes(run, routing, 1)), uneven);
  run.recompute = false;
  run.exchange = Exchange::kPadded;
  EXPECT_GT(sum(recorded_step_bytes(run, routing, 1)), uneven);
  run.exchange = Exchange::kTwoLevel;
  EXPECT_LT(sum(recorded_step_bytes(run, routing, 1)), uneven);
}

TEST(OwnRun, bad_input_is_named) {
  const OwnRun run = small_run(Exchange::kUneven, 2, 2);
  const RoutingCounts routing = recorded(run);
  EXPECT_THROW(recorded_step_bytes(run, routing, 7), ConfigError);
  OwnRun other = run;
  other.sequence_length = 5;
  EXPECT_THROW(recorded_step_bytes(other, routing, 1), ConfigError);
  other = run;
  other.ep = 3;
  EXPECT_THROW(expected_step_bytes(other), ConfigError);
  other = run;
  other.dtype = "int8";
  EXPECT_THROW(expected_step_bytes(other), ConfigError);
}

TEST(OwnRun, memory_and_time_follow_the_run) {
  OwnRun run;
  run.model = load_model("olmoe-1b-7b");
  run.ranks = run.ep = 2;
  run.global_batch = 16;
  run.micro_sequences = 4;
  const Cluster cluster = load_cluster("cpu-2core");
  const MemoryReport memory = own_memory(run, cluster);
  const double parameters = stage_weights(run.model, own_layout(run), own_stack(run), 0).dense +
                            stage_weights(run.model, own_layout(run), own_stack(run), 0).experts;
  EXPECT_NEAR(memory.lines[0].bytes + memory.lines[1].bytes + memory.lines[2].bytes, 18.0 * parameters,
              1e-3 * 18.0 * parameters);
  EXPECT_EQ(memory.device_bytes, memory.peak_bytes);
  const StepTime step = own_step(run, cluster);
  EXPECT_DOUBLE_EQ(step.micro_batches, 4.0);
  EXPECT_GT(own_step(run, cluster, 1.5).step_s, step.step_s);
  run.micro_sequences = 2;
  EXPECT_DOUBLE_EQ(own_step(run, cluster).micro_batches, 8.0);
  EXPECT_LT(own_memory(run, cluster).peak_bytes, memory.peak_bytes);
  run.dtype = "float32";
  EXPECT_GT(own_step(run, cluster).step_s, step.step_s);
}

TEST(OwnRun, a_shorter_last_micro_step_takes_less_time) {
  OwnRun run;
  run.model = load_model("olmoe-1b-7b");
  run.ranks = run.ep = 2;
  const Cluster cluster = load_cluster("cpu-2core");
  const auto step = [&](std::int64_t global, std::int64_t micro) {
    run.global_batch = global;
    run.micro_sequences = micro;
    return own_step(run, cluster);
  };
  const StepTime mixed = step(20, 8);  // 8 + 8 + 4
  const StepTime eights = step(16, 8);
  const StepTime fours = step(8, 4);
  EXPECT_DOUBLE_EQ(mixed.micro_batches, 3.0);
  EXPECT_DOUBLE_EQ(mixed.optimizer_s, eights.optimizer_s);
  const double expected = eights.busy.total() + fours.busy.total() / 2.0;
  EXPECT_NEAR(mixed.busy.total(), expected, 1e-12 * expected);
  EXPECT_NEAR(mixed.step_s - mixed.busy.total(), eights.step_s - eights.busy.total(), 1e-12 * mixed.step_s);
  const double exchange = eights.expert_comm_s + fours.expert_comm_s / 2.0;
  EXPECT_NEAR(mixed.expert_comm_s, exchange, 1e-12 * exchange);
}

TEST(OwnRun, rates_measured_apart_change_what_they_describe) {
  OwnRun run;
  run.model = load_model("olmoe-1b-7b");
  run.sequence_length = 512;
  Cluster cluster = load_cluster("cpu-2core");
  cluster.accelerator.optimizer_efficiency = 0.8;
  cluster.accelerator.attention_length = 512.0;
  const StepTime step = own_step(run, cluster);
  cluster.accelerator.optimizer_efficiency = 0.4;
  EXPECT_DOUBLE_EQ(own_step(run, cluster).optimizer_s, 2.0 * step.optimizer_s);
  EXPECT_DOUBLE_EQ(own_step(run, cluster).busy.total(), step.busy.total());
  // Where attention was measured with longer sequences, more of a block's scores were of use.
  cluster.accelerator.attention_length = 2048.0;
  const double block = static_cast<double>(run.attention_queries);
  const double here = (512.0 + block) / 513.0;
  const double there = (2048.0 + block) / 2049.0;
  EXPECT_NEAR(own_step(run, cluster).busy[Part::kAttention] / step.busy[Part::kAttention], here / there,
              1e-3);
}

TEST(OwnRun, a_measured_step_slows_computation_and_nothing_else) {
  OwnRun run = small_run(Exchange::kUneven, 2, 2);
  Cluster cluster = load_cluster("cpu-2core");
  const StepTime planned = own_step(run, cluster);
  ASSERT_GT(planned.expert_comm_s, 0.0);
  cluster.accelerator.step_efficiency = 0.8;
  const StepTime slower = own_step(run, cluster);
  EXPECT_NEAR(computation_seconds(slower), computation_seconds(planned) / 0.8, 1e-12);
  EXPECT_NEAR(slower.step_s - computation_seconds(slower), planned.step_s - computation_seconds(planned),
              1e-12);
  EXPECT_DOUBLE_EQ(slower.busy[Part::kExpertComm], planned.busy[Part::kExpertComm]);
  EXPECT_NEAR(slower.forward_s + slower.backward_s, slower.busy.total() / slower.micro_batches,
              1e-9 * slower.busy.total());
}

TEST(OwnRun, widened_products_hold_the_output_matrix_twice) {
  // So narrow that the loss is the largest moment.
  OwnRun run = small_run(Exchange::kUneven, 1, 1);
  run.model.layers = 1;
  run.model.moe_layers = {true};
  const double before = own_tensors(run).transient;
  run.widened_products = true;
  EXPECT_DOUBLE_EQ(own_tensors(run).transient,
                   before + 4.0 * static_cast<double>(run.model.vocab * run.model.hidden));
}

}  // namespace
}  // namespace collegium::plan
