// SPDX-License-Identifier: Apache-2.0
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <xxhash.h>

#include <fstream>

#include "collegium/base/error.h"
#include "collegium/plan/routing_counts.h"
#include "collegium/plan/simulator.h"

namespace collegium::plan {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

// A file as the training run writes it; the checksum covers header and ids.
std::filesystem::path write_file(const std::string& name,
                                 const std::vector<std::vector<std::int32_t>>& records, std::int64_t width,
                                 std::int64_t experts) {
  std::string bytes = "CLGROUT1";
  std::int64_t layer = 0;
  for (const std::vector<std::int32_t>& ids : records) {
    const std::int64_t header[6] = {1,     0,      layer++, static_cast<std::int64_t>(ids.size()) / width,
                                    width, experts};
    std::string record(reinterpret_cast<const char*>(header), sizeof(header));
    record.append(reinterpret_cast<const char*>(ids.data()), ids.size() * sizeof(std::int32_t));
    const std::uint64_t sum = XXH3_64bits(record.data(), record.size());
    bytes += record.append(reinterpret_cast<const char*>(&sum), sizeof(sum));
  }
  const std::filesystem::path path = std::filesystem::path(testing::TempDir()) / name;
  std::ofstream(path, std::ios::binary) << bytes;
  return path;
}

std::string message_of(const std::filesystem::path& path) {
  try {
    read_routing(path);
  } catch (const ConfigError& error) {
    return error.what();
  }
  return "no error";
}

TEST(Routing, counts_of_every_layer) {
  const auto path = write_file("routing.bin", {{0, 1, 0, 2}, {3, 3, -1, 0}}, 2, 4);
  const RoutingCounts all = read_routing(path);
  EXPECT_EQ(all.experts, 4);
  EXPECT_EQ(all.top_k, 2);
  ASSERT_EQ(all.records.size(), 2U);
  EXPECT_THAT(all.records[0].counts_E, ElementsAre(2, 1, 1, 0));
  EXPECT_THAT(all.records[1].counts_E, ElementsAre(1, 0, 0, 2));
  EXPECT_EQ(all.records[1].tokens, 2);
}

TEST(Routing, a_torn_end_is_ignored_and_anything_else_named) {
  const auto path = write_file("torn.bin", {{0, 1}, {1, 0}}, 1, 2);
  std::filesystem::resize_file(path, std::filesystem::file_size(path) - 3);
  EXPECT_EQ(read_routing(path).records.size(), 1U);
  std::filesystem::resize_file(path, 20);
  EXPECT_THAT(message_of(path), HasSubstr("holds no routing"));
  EXPECT_THAT(message_of(write_file("far.bin", {{0, 5}}, 1, 2)), HasSubstr("names expert 5, there are 2"));
  std::fstream(write_file("sum.bin", {{0, 1}}, 1, 2), std::ios::in | std::ios::out | std::ios::binary)
          .seekp(60)
      << 'x';
  EXPECT_THAT(message_of(std::filesystem::path(testing::TempDir()) / "sum.bin"), HasSubstr("wrong checksum"));
  std::ofstream(path) << "something else";
  EXPECT_THAT(message_of(path), HasSubstr("not a routing record"));
}

TEST(Routing, imbalance_of_ranks) {
  EXPECT_DOUBLE_EQ(rank_imbalance({2, 2, 2, 2}, 2), 1.0);
  EXPECT_DOUBLE_EQ(rank_imbalance({4, 2, 2, 0}, 2), 1.5);
  // 3 experts on 2 ranks: two and one.
  EXPECT_DOUBLE_EQ(rank_imbalance({1, 1, 2}, 2), 1.0);
  EXPECT_DOUBLE_EQ(rank_imbalance({0, 0}, 2), 1.0);
}

TEST(Routing, recorded_skew_makes_the_pipeline_longer) {
  ModelSpec model = load_model("mixtral-8x7b");
  const Layout layout = parse_layout("pp4.dp8.ep8");
  const Workload work{.seq_len = 4096, .global_batch = 64};
  const Cluster cluster = load_cluster("h100-80");
  const Pipeline pipeline{.schedule = Schedule::k1F1B, .ranks = 4, .virtual_stages = 1, .micro_batches = 8};
  const auto makespan = [&](const std::vector<std::int32_t>& ids) {
    RoutingSkew skew;
    skew.recorded = std::make_shared<RoutingCounts>(read_routing(write_file("skew.bin", {ids}, 2, 8)));
    return simulate(pipeline, layout_durations(model, layout, work, cluster, Stack{}, skew)).makespan_s;
  };
  const double balanced = makespan({0, 1, 2, 3, 4, 5, 6, 7});
  EXPECT_DOUBLE_EQ(
      balanced, simulate(pipeline, layout_durations(model, layout, work, cluster, Stack{}, {})).makespan_s);
  EXPECT_GT(makespan({0, 1, 0, 2, 0, 3, 0, 4}), balanced);
  model.experts = 16;
  EXPECT_THROW(makespan({0, 1}), ConfigError);
}

}  // namespace
}  // namespace collegium::plan
