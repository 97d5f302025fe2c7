// SPDX-License-Identifier: Apache-2.0
#include "collegium/train/machine_folder.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include "collegium/base/error.h"
#include "collegium/base/file.h"
#include "collegium/comm/local/local.h"

namespace collegium::train {
namespace {

namespace fs = std::filesystem;

// Machines "a" and "b" have file systems of their own.
class MachineFolders : public testing::Test {
 protected:
  void SetUp() override {
    for (const char* machine : {"a", "b"}) fs::create_directories(root_ / machine);
  }
  void TearDown() override { fs::remove_all(root_); }

  static std::string machine_of(int rank) { return rank % 2 == 0 ? "a" : "b"; }

  fs::path root_ = fs::temp_directory_path() / fmt::format("collegium_machine_folder_test-{}", ::getpid());
};

TEST_F(MachineFolders, are_filled_once_on_every_machine_and_share_rank_0s_files) {
  for (const int ranks : {1, 2, 3, 4, 7}) {
    std::atomic<int> fills = 0;
    comm::run_ranks(ranks, [&](comm::Communicator& world) {
      const std::string machine = machine_of(world.rank());
      const comm::Seats seats(world, {}, machine);
      MachineFolder folder(
          world.shared_from_this(), seats, "folder",
          [&](const fs::path& path) {
            ++fills;
            write_file_atomically(path / "made", "by " + machine);
          },
          root_ / machine);
      EXPECT_EQ(read_file(folder.path() / "made"), "by " + machine);
      for (const std::string content : {"what rank 0 wrote", "", "again"}) {
        if (world.rank() == 0) write_file_atomically(folder.path() / "record", content);
        folder.share("record");
        EXPECT_EQ(read_file(folder.path() / "record"), content);
        world.barrier();
      }
    });
    EXPECT_EQ(fills, std::min(ranks, 2));
    EXPECT_TRUE(fs::is_empty(root_ / "a") && fs::is_empty(root_ / "b"));
  }
}

TEST_F(MachineFolders, are_one_where_machines_share_their_parent) {
  std::atomic<int> fills = 0;
  comm::run_ranks(4, [&](comm::Communicator& world) {
    const comm::Seats seats(world, {}, machine_of(world.rank()));
    MachineFolder folder(
        world.shared_from_this(), seats, "folder",
        [&](const fs::path& path) {
          ++fills;
          write_file_atomically(path / "made", "x");
        },
        root_ / "a");
    EXPECT_EQ(read_file(folder.path() / "made"), "x");
    if (world.rank() == 0) write_file_atomically(folder.path() / "record", "what rank 0 wrote");
    folder.share("record");
    EXPECT_EQ(read_file(folder.path() / "record"), "what rank 0 wrote");
    world.barrier();
  });
  EXPECT_EQ(fills, 1);
  EXPECT_TRUE(fs::is_empty(root_ / "a"));
}

TEST_F(MachineFolders, a_machine_that_cannot_fill_its_own_is_named) {
  try {
    comm::run_ranks(3, [&](comm::Communicator& world) {
      const std::string machine = machine_of(world.rank());
      const comm::Seats seats(world, {}, machine);
      const MachineFolder folder(
          world.shared_from_this(), seats, "folder",
          [&](const fs::path&) { require_config(machine == "a", "the disk of {} is full", machine); },
          root_ / machine);
    });
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_THAT(error.what(), testing::HasSubstr("the disk of b is full"));
  }
  EXPECT_TRUE(fs::is_empty(root_ / "a") && fs::is_empty(root_ / "b"));
}

}  // namespace
}  // namespace collegium::train
