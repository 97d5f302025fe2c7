// SPDX-License-Identifier: Apache-2.0
#include "collegium/base/temporary_folder.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "collegium/base/error.h"
#include "collegium/base/file.h"

namespace collegium {
namespace {

namespace fs = std::filesystem;

class TemporaryFolders : public testing::Test {
 protected:
  void SetUp() override {
    fs::remove_all(parent_);
    fs::create_directories(parent_);
  }
  void TearDown() override { fs::remove_all(parent_); }

  fs::path parent_ = fs::temp_directory_path() / "collegium_temporary_folder_test";
};

TEST_F(TemporaryFolders, are_removed_with_what_is_in_them) {
  {
    const TemporaryFolder folder(parent_ / "a" / "b");
    fs::create_directories(folder.path() / "c");
    write_file_atomically(folder.path() / "c" / "file", "x");
  }
  EXPECT_FALSE(fs::exists(parent_ / "a" / "b"));
  EXPECT_TRUE(fs::exists(parent_ / "a"));
}

TEST_F(TemporaryFolders, stay_under_their_final_name) {
  {
    TemporaryFolder folder(parent_ / "making");
    write_file_atomically(folder.path() / "file", "x");
    folder.move_to(parent_ / "made");
    TemporaryFolder::remove_all();
  }
  EXPECT_FALSE(fs::exists(parent_ / "making"));
  EXPECT_EQ(read_file(parent_ / "made" / "file"), "x");
}

TEST_F(TemporaryFolders, all_go_at_once) {
  const TemporaryFolder one(parent_ / "one");
  const TemporaryFolder two(parent_ / "two");
  {
    const TemporaryFolder gone(parent_ / "gone");
  }
  fs::create_directories(parent_ / "gone");  // somebody else's by now
  TemporaryFolder::remove_all();
  EXPECT_FALSE(fs::exists(one.path()) || fs::exists(two.path()));
  EXPECT_TRUE(fs::exists(parent_ / "gone"));
}

TEST_F(TemporaryFolders, leave_a_folder_that_was_there_alone) {
  fs::create_directories(parent_ / "mine");
  write_file_atomically(parent_ / "mine" / "file", "x");
  EXPECT_THROW(TemporaryFolder(parent_ / "mine"), Error);
  TemporaryFolder::remove_all();
  EXPECT_EQ(read_file(parent_ / "mine" / "file"), "x");
}

TEST_F(TemporaryFolders, that_cannot_be_made_are_named) {
  write_file_atomically(parent_ / "file", "x");
  try {
    const TemporaryFolder folder(parent_ / "file" / "folder");
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_THAT(error.what(), testing::StartsWith("cannot create " + (parent_ / "file" / "folder").string()));
  }
  TemporaryFolder::remove_all();
  EXPECT_EQ(read_file(parent_ / "file"), "x");
}

}  // namespace
}  // namespace collegium
