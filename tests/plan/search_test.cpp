// SPDX-License-Identifier: Apache-2.0
#include "collegium/plan/search.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>

#include "collegium/base/error.h"
#include "collegium/base/units.h"
#include "collegium/plan/compare.h"

namespace collegium::plan {
namespace {

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

TEST(Search, the_front_knows_every_mode_that_fits) {
  const ModelSpec model = load_model("llama3-8b");
  const Workload work{.seq_len = 4096, .global_batch = 64};
  const Cluster cluster = load_cluster("h100-80");
  const SearchResult found = search(model, work, cluster, Stack{}, {.accelerators = 16, .keep = 100000});
  ASSERT_EQ(found.ranked.size(), found.fitting);
  std::size_t modes = 0;
  for (const Candidate& ranked : found.ranked) {
    for (const Recompute& recompute :
         {Recompute{}, Recompute{.norms = true, .activation = true}, Recompute{.full = true}}) {
      Layout layout = ranked.layout;
      layout.recompute = recompute;
      const double bytes = worst_memory(model, layout, work, cluster, Stack{}).device_bytes;
      if (bytes > cluster.accelerator.memory_gib * kGiB) continue;
      ++modes;
      const double seconds = step_time(model, layout, work, cluster, Stack{}).step_s;
      EXPECT_TRUE(std::any_of(found.front.begin(), found.front.end(), [&](const Candidate& c) {
        return c.time.step_s <= seconds && c.memory.device_bytes <= bytes;
      })) << layout_name(layout);
    }
  }
  EXPECT_GT(modes, found.fitting);
  for (std::size_t i = 1; i < found.front.size(); ++i)
    EXPECT_GT(found.front[i].time.step_s, found.front[i - 1].time.step_s);
}

TEST(Search, experts_and_states_are_cut_whatever_the_dense_part_is) {
  const auto any = [](const char* model, const Workload& work, auto&& wanted) {
    const SearchResult found = search(load_model(model), work, load_cluster("h100-80"), Stack{},
                                      {.accelerators = 64, .keep = 100000});
    return std::any_of(found.ranked.begin(), found.ranked.end(),
                       [&](const Candidate& c) { return wanted(c.layout); });
  };
  EXPECT_TRUE(any("mixtral-8x7b", {.global_batch = 64},
                  [](const Layout& l) { return l.etp > l.tp && l.ep * l.etp > 8; }));
  // One sequence: no data parallelism, but ranks of a context that hold the same weights.
  EXPECT_TRUE(any("llama3-8b", {.seq_len = 262144, .global_batch = 1},
                  [](const Layout& l) { return l.dp == 1 && l.zero == Zero::kSharded; }));
}

TEST(Search, a_front_of_equally_fast_layouts_is_printed) {
  SearchResult found;
  found.front.resize(2);
  for (Candidate& candidate : found.front) candidate.time.step_s = 1.0;
  found.front.front().memory.device_bytes = 1e9;
  const std::string text = format_search(found, load_model("llama3-8b"), {}, load_cluster("h100-80"), 10);
  EXPECT_THAT(text, testing::HasSubstr("the Pareto front"));
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
