// SPDX-License-Identifier: Apache-2.0
#include "collegium/mesh/mesh.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <set>

#include "collegium/base/error.h"

namespace collegium::mesh {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

// 8 ranks, dense dp=2 cp=2 tp=2, experts edp=2 ep=4 etp=1 over the same ranks:
//
//   rank      0 1 2 3 4 5 6 7
//   dp cp tp  000 001 010 011 100 101 110 111
//   edp ep    00  01  02  03  10  11  12  13
TEST(Mesh, folds_dense_and_experts_independently) {
  const Mesh mesh({.dp = 2, .cp = 2, .tp = 2, .ep = 4});
  EXPECT_EQ(mesh.size(), 8);
  EXPECT_EQ(mesh.size(Axis::kEdp), 2);
  const Coordinates six = mesh.coordinates(6);
  EXPECT_EQ(six, (Coordinates{.dp = 1, .cp = 1, .tp = 0, .edp = 1, .ep = 2, .etp = 0}));
  EXPECT_THAT(mesh.group({Axis::kTp}, 6), ElementsAre(6, 7));
  EXPECT_THAT(mesh.group({Axis::kDp}, 6), ElementsAre(2, 6));
  EXPECT_THAT(mesh.group({Axis::kDp, Axis::kCp}, 6), ElementsAre(0, 2, 4, 6));
  EXPECT_THAT(mesh.group({Axis::kEp}, 6), ElementsAre(4, 5, 6, 7));
  EXPECT_THAT(mesh.group({Axis::kEdp}, 6), ElementsAre(2, 6));
}

TEST(Mesh, six_experts_on_two_ranks_is_data_and_expert_parallel) {
  const Mesh mesh({.dp = 2, .ep = 2});
  EXPECT_THAT(mesh.group({Axis::kEp}, 0), ElementsAre(0, 1));
  EXPECT_THAT(mesh.group({Axis::kEdp}, 1), ElementsAre(1));
}

TEST(Mesh, pipeline_stages_lie_far_apart) {
  const Mesh mesh({.pp = 3, .dp = 2, .tp = 2, .etp = 2});
  EXPECT_THAT(mesh.group({Axis::kPp}, 5), ElementsAre(1, 5, 9));
  EXPECT_EQ(mesh.coordinates(5).pp, 1);
  EXPECT_EQ(mesh.expert_rank(1, 0, 0, 1), 5);
}

TEST(Mesh, ranks_and_coordinates_are_inverse_and_groups_partition_the_world) {
  for (const int tp : {1, 2, 4}) {
    for (const int ep : {1, 3, 6}) {
      const Mesh mesh({.pp = 2, .dp = 6, .cp = 2, .tp = tp, .ep = ep, .etp = 2});
      for (int rank = 0; rank < mesh.size(); ++rank) {
        const Coordinates at = mesh.coordinates(rank);
        EXPECT_EQ(mesh.dense_rank(at.pp, at.dp, at.cp, at.tp), rank);
        EXPECT_EQ(mesh.expert_rank(at.pp, at.edp, at.ep, at.etp), rank);
      }
      std::set<int> seen;
      for (const std::vector<int>& members : mesh.groups({Axis::kEp, Axis::kEtp})) {
        EXPECT_EQ(members.size(), static_cast<std::size_t>(2 * ep));
        seen.insert(members.begin(), members.end());
      }
      EXPECT_EQ(seen.size(), static_cast<std::size_t>(mesh.size()));
    }
  }
}

template <typename F>
std::string message_of(F&& call) {
  try {
    call();
  } catch (const ConfigError& error) {
    return error.what();
  }
  return "no error";
}

TEST(Mesh, errors_name_the_sizes) {
  EXPECT_THAT(message_of([] { Mesh({.dp = 4, .tp = 2, .ep = 6}); }),
              HasSubstr("ep*etp = 6*1 = 6 must divide dp*cp*tp = 4*1*2 = 8"));
  EXPECT_THAT(message_of([] { Mesh({.dp = 0}); }), HasSubstr("mesh.dp = 0: must be at least 1"));
  EXPECT_THAT(message_of([] { Mesh({.dp = 1 << 22, .cp = 1 << 21, .tp = 1 << 21}); }),
              HasSubstr("pp*dp*cp*tp = 1*4194304*2097152*2097152 ranks: must be at most 2147483647"));
  const Mesh mesh({.dp = 2});
  EXPECT_THAT(message_of([&] { static_cast<void>(mesh.coordinates(2)); }), HasSubstr("must be in [0, 2)"));
  EXPECT_THAT(message_of([&] { static_cast<void>(mesh.group({Axis::kDp, Axis::kEp}, 0)); }),
              HasSubstr("axes dp and ep"));
  EXPECT_THAT(message_of([&] { static_cast<void>(mesh.dense_rank(0, 2, 0, 0)); }),
              HasSubstr("coordinate dp = 2"));
}

}  // namespace
}  // namespace collegium::mesh
