// SPDX-License-Identifier: Apache-2.0
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <set>

#include "collegium/base/error.h"
#include "collegium/base/rng.h"
#include "collegium/plan/collectives.h"
#include "collegium/plan/data_parallel.h"
#include "collegium/plan/simulator.h"
#include "collegium/plan/traffic.h"

namespace collegium::plan {
namespace {

TEST(Collectives, distinct_groups_of_a_token) {
  EXPECT_NEAR(distinct_groups(256, 8, 8), 5.295, 5e-4);
  EXPECT_NEAR(distinct_groups(256, 8, 16), 6.523, 5e-4);
  EXPECT_NEAR(distinct_groups(256, 8, 64), 7.676, 5e-4);
  EXPECT_NEAR(distinct_groups(256, 8, 2), 1.993, 5e-4);
  EXPECT_NEAR(distinct_groups(128, 8, 8), 5.339, 5e-4);
  EXPECT_NEAR(distinct_groups(8, 2, 2), 1.571, 5e-4);
  EXPECT_DOUBLE_EQ(distinct_groups(8, 2, 8), 2.0);
  EXPECT_DOUBLE_EQ(distinct_groups(8, 2, 1), 1.0);
}

// The closed form against counting: random tokens choose 4 of 32 experts on 8 ranks.
TEST(Collectives, distinct_groups_agree_with_counted_routing) {
  constexpr int kTokens = 20000;
  const RandomStream random(7, "test/routing");
  double touched = 0.0;
  for (int t = 0; t < kTokens; ++t) {
    std::set<std::uint64_t> experts;
    for (std::uint64_t draw = 0; experts.size() < 4; ++draw)
      experts.insert(random.bits(static_cast<std::uint64_t>(t), draw) % 32);
    std::set<std::uint64_t> ranks;
    for (const std::uint64_t e : experts) ranks.insert(e / 4);
    touched += static_cast<double>(ranks.size());
  }
  // Standard error of the mean is below 0.005.
  EXPECT_NEAR(touched / kTokens, distinct_groups(32, 4, 8), 0.02);
}

// The closed form against counting: a gate chooses the groups whose two best scores sum to most, and of these
// groups the best experts.
double counted_places(const ModelSpec& m, std::uint64_t places) {
  constexpr int kTokens = 1500;
  const auto experts = static_cast<std::size_t>(m.experts);
  const auto per_group = static_cast<std::size_t>(m.experts / m.routing_groups);
  const RandomStream random(11, "test/gate");
  double touched = 0.0;
  for (int t = 0; t < kTokens; ++t) {
    std::vector<double> scores(experts);
    for (std::size_t e = 0; e < experts; ++e)
      scores[e] = random.normal(static_cast<std::uint64_t>(t) * experts + e);
    std::vector<std::pair<double, std::size_t>> groups;
    for (std::size_t g = 0; g < experts / per_group; ++g) {
      std::vector<double> own(&scores[g * per_group], &scores[g * per_group] + per_group);
      std::sort(own.rbegin(), own.rend());
      groups.emplace_back(own[0] + own[1], g);
    }
    std::sort(groups.rbegin(), groups.rend());
    groups.resize(static_cast<std::size_t>(m.routing_top_groups));
    std::vector<std::pair<double, std::size_t>> reachable;
    for (const auto& [sum, g] : groups) {
      for (std::size_t e = g * per_group; e < (g + 1) * per_group; ++e) reachable.emplace_back(scores[e], e);
    }
    std::sort(reachable.rbegin(), reachable.rend());
    std::set<std::size_t> seen;
    for (std::size_t k = 0; k < static_cast<std::size_t>(m.top_k); ++k)
      seen.insert(reachable[k].second * places / experts);
    touched += static_cast<double>(seen.size());
  }
  return touched / kTokens;
}

TEST(Collectives, places_under_limited_routing_agree_with_counted_routing) {
  ModelSpec model = load_model("deepseek-v3");
  for (const std::uint64_t places : {2U, 4U, 8U, 16U, 32U, 128U}) {
    const double counted = counted_places(model, places);
    EXPECT_NEAR(distinct_places(model, static_cast<double>(places)), counted, 0.02 * counted) << places;
  }
  model.routing_top_groups = 1;
  EXPECT_DOUBLE_EQ(distinct_places(model, 8.0), 1.0);
  EXPECT_NEAR(distinct_places(model, 16.0), counted_places(model, 16), 0.02);
  model.routing_groups = 0;
  EXPECT_DOUBLE_EQ(distinct_places(model, 16.0), distinct_groups(256, 8, 16));
}

TEST(Collectives, groups_of_experts_that_span_domains_reach_more_of_them) {
  const ModelSpec model = load_model("deepseek-v3");
  const Layout layout{.dp = 128, .ep = 128, .dispatcher = Dispatcher::kHierarchical};
  // 16 domains, a group in two of them: four groups are eight domains.
  EXPECT_NEAR(expert_traffic(model, layout, load_cluster("h100-80"), 1.0).slow_rows, 5.7 * 15 / 16, 0.05);
}

TEST(Collectives, imbalance_counts_once_and_where_it_is) {
  const ModelSpec model = load_model("mixtral-8x7b");
  Cluster cluster = load_cluster("h100-80");
  cluster.fast_link.latency_us = cluster.slow_link.latency_us = 0.0;
  const auto ratio = [&](Dispatcher dispatcher) {
    const Layout layout{.dp = 8, .ep = 8, .dispatcher = dispatcher};
    return expert_exchange_seconds(model, layout, cluster, 4096.0, 8192.0, 2.0) /
           expert_exchange_seconds(model, layout, cluster, 4096.0, 8192.0, 1.0);
  };
  for (const Dispatcher uneven : {Dispatcher::kAllToAll, Dispatcher::kDeduplicated, Dispatcher::kPadded})
    EXPECT_NEAR(ratio(uneven), 2.0, 1e-9);
  EXPECT_NEAR(ratio(Dispatcher::kAllGather), 1.0, 1e-9);
}

TEST(Collectives, rows_are_conserved_and_deduplication_sends_fewer) {
  const ModelSpec model = load_model("deepseek-v3");
  const Cluster cluster = load_cluster("h100-80");
  Layout layout{.dp = 64, .ep = 64};
  const ExpertTraffic plain = expert_traffic(model, layout, cluster, 1.0);
  EXPECT_NEAR(plain.fast_rows + plain.slow_rows, 8.0 * 63 / 64, 1e-12);
  layout.dispatcher = Dispatcher::kDeduplicated;
  const ExpertTraffic dedup = expert_traffic(model, layout, cluster, 1.0);
  EXPECT_LT(dedup.slow_rows, plain.slow_rows);
  layout.dispatcher = Dispatcher::kHierarchical;
  const ExpertTraffic two_levels = expert_traffic(model, layout, cluster, 1.0);
  EXPECT_NEAR(two_levels.slow_rows, 4.0 * 7 / 8, 1e-12);  // routing is limited to four of eight domains
}

TEST(Collectives, ranks_that_share_memory_send_rows_to_other_domains_alone) {
  const ModelSpec model = load_model("mixtral-8x7b");
  const Cluster cluster = load_cluster("h100-80");
  Layout layout{.dp = 8, .ep = 8, .dispatcher = Dispatcher::kSharedMemory};
  const double latency_s = exchange_latency_us(cluster.fast_link) * 1e-6;
  EXPECT_EQ(expert_exchange_seconds(model, layout, cluster, 4096.0, 8192.0, 1.5), latency_s);
  layout.etp = 2;
  const double shared = expert_traffic(model, layout, cluster, 1.0).slow_rows;
  layout.dispatcher = Dispatcher::kAllToAll;
  EXPECT_EQ(shared, expert_traffic(model, layout, cluster, 1.0).slow_rows);
  EXPECT_GT(shared, 0.0);
}

TEST(Collectives, a_rank_sends_what_the_published_formula_says) {
  // Forward bytes of a MoE layer: 2 T K D bytes (1 - 1/ep), and 4 bytes of weight per dispatched row.
  const ModelSpec model = load_model("mixtral-8x7b");
  const Layout layout{.dp = 8, .ep = 8};
  const Workload work{.seq_len = 4096, .global_batch = 8};
  double bytes = 0.0;
  for (const TrafficLine& line : step_traffic(model, layout, work, load_cluster("h100-80"), Stack{})) {
    if (line.axes == "ep") bytes += line.bytes() / (2.0 * 32.0);
  }
  EXPECT_DOUBLE_EQ(bytes, 2.0 * 4096 * 2 * 4096 * 2 * 7 / 8 + 4096 * 2 * 4.0 * 7 / 8);
}

TEST(Collectives, tensor_parallel_ranks_reduce_what_they_share) {
  const auto reductions = [](const char* name) {
    const Workload work{.seq_len = 4096, .global_batch = 8};
    const auto lines =
        step_traffic(load_model(name), parse_layout("tp2.dp8"), work, load_cluster("h100-80"), Stack{});
    EXPECT_EQ(lines.front().axes, "tp");
    return lines.front().uses;
  };
  // Forward and backward: attention and a network, or attention alone where experts are reached by dispatch.
  EXPECT_EQ(reductions("llama3-8b"), 2.0 * 2 * 32);
  EXPECT_EQ(reductions("mixtral-8x7b"), 2.0 * 32);
  EXPECT_EQ(reductions("deepseek-v2-lite"), 2.0 * 2 * 27);
}

const TrafficLine& line_of(const std::vector<TrafficLine>& lines, const std::string& operation) {
  for (const TrafficLine& line : lines) {
    if (line.operation == operation) return line;
  }
  throw InternalError(fmt::format("no {}", operation));
}

TEST(DataParallel, shards_of_gradients_are_reduced_after_every_micro_batch) {
  const ModelSpec model = load_model("llama3-8b");
  const Cluster cluster = load_cluster("h100-80");
  const auto comm = [&](const char* layout, double batch) {
    return step_time(model, parse_layout(layout), {.seq_len = 4096, .global_batch = batch}, cluster, Stack{})
        .data_comm_s;
  };
  EXPECT_DOUBLE_EQ(comm("dp16.zero2", 16), comm("dp16.zero1", 16));
  EXPECT_GT(comm("dp16.zero2", 64), comm("dp16.zero1", 64));
  EXPECT_NEAR(comm("dp16.zero2", 64) - comm("dp16.zero2", 48),
              comm("dp16.zero2", 48) - comm("dp16.zero2", 32), 1e-9);
  const auto scatters = [&](const char* layout) {
    const Workload work{.seq_len = 4096, .global_batch = 64};
    return line_of(step_traffic(model, parse_layout(layout), work, cluster, Stack{}), "reduce-scatter").uses;
  };
  EXPECT_EQ(scatters("dp16.zero1"), 1.0);
  EXPECT_EQ(scatters("dp16.zero2"), 4.0);
  const auto variants = data_parallel_variants(model, parse_layout("dp16"),
                                               {.seq_len = 4096, .global_batch = 64}, cluster, Stack{});
  EXPECT_DOUBLE_EQ(variants[4].sent_bytes - variants[3].sent_bytes,
                   3.0 * line_of(step_traffic(model, parse_layout("dp16.zero2"),
                                              {.seq_len = 4096, .global_batch = 64}, cluster, Stack{}),
                                 "reduce-scatter")
                             .bytes_per_use);
}

TEST(DataParallel, mirrored_stages_are_replicas) {
  const ModelSpec model = load_model("llama3-8b");
  const Workload work{.seq_len = 4096, .global_batch = 64};
  const Cluster cluster = load_cluster("h100-80");
  const auto reduce = [&](const char* layout) {
    return line_of(step_traffic(model, parse_layout(layout), work, cluster, Stack{}), "reduce-scatter");
  };
  const TrafficLine plain = reduce("pp4.dp8");
  const TrafficLine dual = reduce("pp4.dp8.dualpipe");
  EXPECT_EQ(dual.ranks, 2 * plain.ranks);
  EXPECT_GT(dual.bytes_per_use, 1.9 * plain.bytes_per_use);
  const auto comm = [&](const char* layout) {
    return step_time(model, parse_layout(layout), work, cluster, Stack{}).data_comm_s;
  };
  EXPECT_GT(comm("pp4.dp8.dualpipe"), comm("pp4.dp8"));
}

TEST(StepTime, whatever_is_recomputed_takes_time) {
  const auto step = [](const Recompute& recompute) {
    return step_time(load_model("llama3-8b"), {.dp = 8, .recompute = recompute},
                     {.seq_len = 4096, .global_batch = 8}, load_cluster("h100-80"), Stack{})
        .step_s;
  };
  EXPECT_GT(step({.operators = true}), step({}));
  EXPECT_LT(step({.operators = true}), step({.full = true}));
}

TEST(StepTime, is_monotone_in_batch_and_bandwidth) {
  const ModelSpec model = load_model("mixtral-8x7b");
  Cluster cluster = load_cluster("h100-80");
  const Layout layout{.tp = 2, .pp = 4, .dp = 8, .ep = 8};
  double before = 0.0;
  for (const double batch : {64.0, 128.0, 256.0}) {
    const double seconds =
        step_time(model, layout, {.seq_len = 4096, .global_batch = batch}, cluster, Stack{}).step_s;
    EXPECT_GT(seconds, before);
    before = seconds;
  }
  cluster.slow_link.gb_per_s *= 4.0;
  EXPECT_LT(step_time(model, layout, {.seq_len = 4096, .global_batch = 256}, cluster, Stack{}).step_s,
            before);
}

TEST(StepTime, parts_sum_to_the_step) {
  const StepTime t = step_time(load_model("qwen3-235b-a22b"), {.tp = 2, .pp = 8, .dp = 16, .ep = 32},
                               {.seq_len = 4096, .global_batch = 256}, load_cluster("h100-80"), Stack{});
  EXPECT_NEAR(
      t.busy.total() + t.stage_imbalance_s + t.bubble_s + t.pipeline_comm_s + t.data_comm_s + t.optimizer_s,
      t.step_s, 1e-9 * t.step_s);
}

TEST(Gemm, waves_and_shapes) {
  const Accelerator a = load_cluster("a100-80").accelerator;
  // 108 units: 12 x 9 tiles fill one wave, one more row of tiles needs a second.
  EXPECT_GT(gemm_utilisation(a, 12 * 256, 9 * 128, 8192), gemm_utilisation(a, 13 * 256, 9 * 128, 8192));
  EXPECT_GT(gemm_utilisation(a, 8192, 8192, 8192), gemm_utilisation(a, 8192, 8192, 64));
  EXPECT_LE(gemm_utilisation(a, 8192, 8192, 8192), 1.0);
}

Durations equal_durations(double forward, double backward, bool split) {
  return {.forward = [forward](const Task&) { return forward; },
          .backward = [backward, split](const Task&) { return split ? backward / 2.0 : backward; },
          .weights = [backward](const Task&) { return backward / 2.0; },
          .send_s = 0.0};
}

// With equal stages: m micro-batches and the bubble that step_time() books, (F + B) each. DualPipe's rules
// order passes otherwise than its paper, so its bubble is another.
TEST(Simulator, equals_the_closed_forms) {
  const auto closed_form = [](Schedule schedule, int ranks, int virtual_stages, int micro) {
    Layout layout;
    layout.pp = ranks;
    layout.virtual_stages = virtual_stages;
    layout.schedule = schedule;
    return (micro + bubble_micro_batches(layout, 1.0, 2.0)) * 3.0;
  };
  for (const int ranks : {2, 4, 8}) {
    for (const int micro : {8, 16}) {
      const Simulation zero =
          simulate({Schedule::kZeroBubble, ranks, 1, micro}, equal_durations(1.0, 2.0, true));
      EXPECT_NEAR(zero.makespan_s, closed_form(Schedule::kZeroBubble, ranks, 1, micro), 1e-9);
      for (const Schedule schedule : {Schedule::kGPipe, Schedule::k1F1B}) {
        const Simulation s = simulate({schedule, ranks, 1, micro}, equal_durations(1.0, 2.0, false));
        EXPECT_NEAR(s.makespan_s, (micro + ranks - 1) * 3.0, 1e-9);
        EXPECT_NEAR(s.makespan_s, closed_form(schedule, ranks, 1, micro), 1e-9);
        EXPECT_EQ(s.peak_chunks.front(), schedule == Schedule::kGPipe ? micro : std::min(micro, ranks));
      }
      const Simulation s =
          simulate({Schedule::kInterleaved, ranks, 2, micro}, equal_durations(0.5, 1.0, false));
      EXPECT_NEAR(s.makespan_s, micro * 3.0 + (ranks - 1) * 3.0 / 2.0, 1e-9);
      EXPECT_NEAR(s.makespan_s, closed_form(Schedule::kInterleaved, ranks, 2, micro), 1e-9);
      EXPECT_EQ(s.peak_chunks.front(), std::min(2 * micro, 2 * (ranks - 1) + ranks + 1));
    }
  }
}

// What a stage's chunks take in the simulator is what step_time() books for the stage.
TEST(Simulator, chunks_are_the_stages_of_the_step) {
  const Workload work{.seq_len = 4096, .global_batch = 256};
  const Cluster cluster = load_cluster("h100-80");
  for (const char* name : {"deepseek-v3", "gpt-oss-120b", "llama3-8b"}) {
    const ModelSpec model = load_model(name);
    for (const char* text : {"pp8.dp8", "pp4.vp2.dp8", "pp6.dp8", "pp8.dp8.dualpipe"}) {
      const Layout layout = parse_layout(text);
      const Durations passes = layout_durations(model, layout, work, cluster, Stack{}, {});
      double seconds = 0.0;
      for (int chunk = 0; chunk < layout.pp * layout.virtual_stages; ++chunk) {
        const double backward = passes.backward({.pass = Pass::kBackward, .micro_batch = 0, .chunk = chunk});
        seconds += passes.forward({.pass = Pass::kForward, .micro_batch = 0, .chunk = chunk}) +
                   (splits_backward(layout.schedule) ? 2.0 : 1.0) * backward;
      }
      const StepTime step = step_time(model, layout, work, cluster, Stack{});
      EXPECT_NEAR(seconds * step.micro_batches / layout.pp, step.busy.total(), 1e-9 * step.busy.total())
          << name << " " << text;
    }
  }
}

TEST(Simulator, the_first_chunks_have_the_remainder) {
  ModelSpec model = load_model("llama3-8b");
  model.layers = 10;
  model.moe_layers.resize(10);
  const Durations passes = layout_durations(model, parse_layout("pp4"), {.seq_len = 4096, .global_batch = 8},
                                            load_cluster("h100-80"), Stack{}, {});
  const auto forward = [&](int chunk) { return passes.forward({.chunk = chunk}); };
  EXPECT_NEAR(forward(0) / forward(2), 1.5, 1e-9);
  EXPECT_NEAR(forward(1) / forward(2), 1.5, 1e-9);
}

TEST(Simulator, split_backward_passes_leave_less_idle) {
  const double fixed = simulate({Schedule::k1F1B, 4, 1, 16}, equal_durations(1.0, 2.0, false)).makespan_s;
  const Simulation zero = simulate({Schedule::kZeroBubble, 4, 1, 16}, equal_durations(1.0, 2.0, true));
  const Simulation dual = simulate({Schedule::kDualPipe, 4, 1, 16}, equal_durations(1.0, 2.0, true));
  EXPECT_LT(zero.makespan_s, fixed);
  EXPECT_LT(dual.makespan_s, zero.makespan_s);
  EXPECT_LE(zero.peak_chunks.front(), 4);
  EXPECT_LE(dual.peak_chunks.front(), 5);
}

TEST(Simulator, every_pass_runs_once_after_what_it_needs) {
  const Simulation s = simulate({Schedule::kDualPipe, 4, 1, 8}, equal_durations(1.0, 2.0, true));
  EXPECT_EQ(s.spans.size(), 3U * 4U * 8U);
  std::set<std::tuple<int, int, int>> seen;
  for (const Span& span : s.spans)
    seen.insert({static_cast<int>(span.task.pass), span.task.micro_batch, span.task.chunk});
  EXPECT_EQ(seen.size(), s.spans.size());
  EXPECT_EQ(Json::parse(trace_json(s))["traceEvents"].size(), s.spans.size() + 4);
  EXPECT_THROW(simulate({Schedule::kDualPipe, 3, 1, 8}, equal_durations(1.0, 2.0, true)), ConfigError);
  EXPECT_THROW(simulate({Schedule::kInterleaved, 4, 2, 6}, equal_durations(1.0, 2.0, false)), ConfigError);
}

TEST(Simulator, skew_makes_ranks_wait) {
  EXPECT_DOUBLE_EQ(skewed_imbalance(64, 8, 0.0, 1, 0), 1.0);
  EXPECT_GT(skewed_imbalance(64, 8, 1.0, 1, 0), 1.0);
  EXPECT_LE(skewed_imbalance(64, 8, 1.0, 1, 0), 8.0);
  // One expert takes everything, whose popularity no double could hold.
  EXPECT_DOUBLE_EQ(skewed_imbalance(64, 8, 1e300, 1, 0), 8.0);
}

TEST(Simulator, a_duration_that_is_no_number_is_refused) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  EXPECT_THROW(simulate({Schedule::k1F1B, 4, 1, 8}, equal_durations(nan, 2.0, false)), InternalError);
}

// Ranks of one sequence hold the same weights: a server hears them all.
TEST(DataParallel, context_parallel_ranks_are_replicas_too) {
  const ModelSpec model = load_model("llama3-8b");
  const Workload work{.seq_len = 4096, .global_batch = 8};
  const auto central = [&](const char* layout) {
    return data_parallel_variants(model, parse_layout(layout), work, load_cluster("h100-80"), Stack{})
        .front();
  };
  EXPECT_DOUBLE_EQ(central("dp4.cp2").busiest_bytes, central("dp8").busiest_bytes);
  EXPECT_DOUBLE_EQ(central("dp8").busiest_bytes, 2.0 * central("dp4").busiest_bytes);
  EXPECT_GT(central("dp4.cp2").exposed_s, central("dp4").exposed_s);
}

}  // namespace
}  // namespace collegium::plan
