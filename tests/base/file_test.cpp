// SPDX-License-Identifier: Apache-2.0
#include "collegium/base/file.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "collegium/base/error.h"

namespace collegium {
namespace {

namespace fs = std::filesystem;

class File : public testing::Test {
 protected:
  void SetUp() override {
    folder_ = fs::temp_directory_path() / testing::UnitTest::GetInstance()->current_test_info()->name();
    fs::remove_all(folder_);
    fs::create_directories(folder_);
  }
  void TearDown() override { fs::remove_all(folder_); }
  std::size_t entries() const {
    return static_cast<std::size_t>(std::distance(fs::directory_iterator(folder_), fs::directory_iterator()));
  }
  fs::path folder_;
};

TEST_F(File, committed_file_has_its_content) {
  write_file_atomically(folder_ / "a", "hello");
  EXPECT_EQ(read_file(folder_ / "a"), "hello");
  EXPECT_EQ(entries(), 1U);
}

TEST_F(File, uncommitted_file_leaves_old_content_and_nothing_else) {
  write_file_atomically(folder_ / "a", "old");
  {
    AtomicFile file(folder_ / "a");
    file.write("new");
  }
  EXPECT_EQ(read_file(folder_ / "a"), "old");
  EXPECT_EQ(entries(), 1U);
}

TEST_F(File, missing_file_is_named) {
  try {
    read_file(folder_ / "none");
    FAIL();
  } catch (const ConfigError& error) {
    EXPECT_THAT(error.what(), testing::HasSubstr("none: No such file"));
  }
}

TEST_F(File, full_disk_is_an_error_with_its_reason) {
  if (!fs::exists("/dev/full")) GTEST_SKIP() << "no /dev/full here";
  fs::create_symlink("/dev/full", folder_ / fmt::format("b.tmp-{}", ::getpid()));
  AtomicFile file(folder_ / "b");
  EXPECT_THROW(file.write("x"), Error);
}

TEST_F(File, empty_file_maps_to_no_bytes) {
  write_file_atomically(folder_ / "a", "");
  EXPECT_TRUE(MappedFile(folder_ / "a").bytes().empty());
}

TEST_F(File, checksum_is_xxh3) {
  // XXH3_64bits of no bytes, from the specification's test vectors.
  EXPECT_EQ(checksum({}), "2d06800538d394c2");
}

}  // namespace
}  // namespace collegium
