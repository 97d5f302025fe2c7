// SPDX-License-Identifier: Apache-2.0
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <limits>
#include <set>

#include "collegium/base/error.h"
#include "collegium/base/rng.h"
#include "collegium/plan/collectives.h"
#include "collegium/plan/compare.h"
#include "collegium/plan/data_parallel.h"
#include "collegium/plan/search.h"
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

TEST(Search, ranks_by_time_and_explains) {
  const ModelSpec model = load_model("mixtral-8x7b");
  const Workload work{.seq_len = 4096, .global_batch = 256};
  const SearchResult found = search(model, work, load_cluster("h100-80"), Stack{}, {.accelerators = 64});
  ASSERT_GT(found.ranked.size(), 10U);
  for (std::size_t i = 1; i < found.ranked.size(); ++i) {
    EXPECT_GE(found.ranked[i].time.step_s, found.ranked[i - 1].time.step_s);
    EXPECT_EQ(found.ranked[i].layout.world(), 64);
    EXPECT_GE(found.ranked[i].headroom_bytes, 0.0);
  }
  for (std::size_t i = 1; i < found.front.size(); ++i)
    EXPECT_LT(found.front[i].memory.device_bytes, found.front[i - 1].memory.device_bytes);
  EXPECT_FALSE(found.rejected.empty());
  EXPECT_THROW(search(model, {.global_batch = 0}, load_cluster("h100-80"), Stack{}, {.accelerators = 8}),
               ConfigError);
}

TEST(Search, where_nothing_fits_the_least_missing_comes_first) {
  const SearchResult found = search(load_model("deepseek-v3"), {.seq_len = 4096, .global_batch = 64},
                                    load_cluster("h100-80"), Stack{}, {.accelerators = 16});
  ASSERT_TRUE(found.ranked.empty());
  ASSERT_GT(found.rejected.size(), 2U);
  EXPECT_GT(found.rejected.front().over_gib, 0.0);
  for (std::size_t i = 1; i < found.rejected.size(); ++i) {
    const double before = found.rejected[i - 1].over_gib;
    const double missing = found.rejected[i].over_gib;
    EXPECT_TRUE(missing == 0.0 || (before > 0.0 && missing > before)) << found.rejected[i].reason;
  }
}

TEST(Search, a_thousand_accelerators_take_less_than_two_seconds) {
  const auto start = std::chrono::steady_clock::now();
  search(load_model("deepseek-v3"), {.seq_len = 4096, .global_batch = 4096}, load_cluster("h100-80"), Stack{},
         {.accelerators = 1024});
  EXPECT_LT(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(), 2.0);
}

TEST(Compare, classical_layouts_have_their_published_sizes) {
  const std::vector<int> sizes = {4480, 384, 768, 992, 1024};
  const auto all = compare_classics();
  ASSERT_EQ(all.size(), sizes.size());
  for (std::size_t i = 0; i < all.size(); ++i) {
    EXPECT_EQ(all[i].published.world(), sizes[i]) << all[i].classic.model;
    EXPECT_GT(all[i].chosen.time.step_s, 0.0) << all[i].classic.model;
  }
}

}  // namespace
}  // namespace collegium::plan
