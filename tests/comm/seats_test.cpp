// SPDX-License-Identifier: Apache-2.0
#include "collegium/comm/seats.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "collegium/comm/local/local.h"

namespace collegium::comm {
namespace {

using testing::ElementsAre;

TEST(Seats, of_one_machine) {
  for (const int ranks : {1, 2, 3, 4, 7}) {
    run_ranks(ranks, [ranks](Communicator& world) {
      const Seats seats(world, {0, 1, 1023});
      EXPECT_EQ(seats.neighbours().size(), static_cast<std::size_t>(ranks));
      EXPECT_THAT(seats.first_ranks(), ElementsAre(0));
      EXPECT_EQ(seats.num_cores(), 3);
      EXPECT_EQ(seats.place_among_sharers().place, world.rank());
      EXPECT_EQ(seats.place_among_sharers().count, ranks);
    });
  }
}

TEST(Seats, of_machines_whose_ranks_have_cores_of_their_own) {
  // Machine, cores: the same numbers on another machine are other cores.
  const std::vector<std::pair<std::string, std::vector<int>>> layout = {
      {"b", {0}}, {"a", {0, 1}}, {"b", {1, 64}}, {"a", {0, 1}}, {"b", {0}}, {"c", {}}};
  run_ranks(6, [&layout](Communicator& world) {
    const auto rank = static_cast<std::size_t>(world.rank());
    const Seats seats(world, layout[rank].second, layout[rank].first);
    EXPECT_THAT(seats.first_ranks(), ElementsAre(0, 1, 5));
    const std::vector<std::vector<int>> neighbours = {{0, 2, 4}, {1, 3}, {0, 2, 4}, {1, 3}, {0, 2, 4}, {5}};
    EXPECT_EQ(seats.neighbours(), neighbours[rank]);
    EXPECT_EQ(seats.num_cores(), (std::vector{3, 2, 3, 2, 3, 0})[rank]);
    EXPECT_EQ(seats.place_among_sharers().place, (std::vector{0, 0, 0, 1, 1, 0})[rank]);
    EXPECT_EQ(seats.place_among_sharers().count, (std::vector{2, 2, 1, 2, 2, 1})[rank]);
  });
}

}  // namespace
}  // namespace collegium::comm
