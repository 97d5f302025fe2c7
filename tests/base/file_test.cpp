// SPDX-License-Identifier: Apache-2.0
#include "collegium/base/file.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

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
  try {
    AtomicFile file(folder_ / "b");
    file.write("x");
    FAIL();
  } catch (const Error& error) {
    EXPECT_THAT(error.what(), testing::MatchesRegex("cannot write .*/b: No space left on device"));
  }
  EXPECT_EQ(entries(), 0U);
}

TEST_F(File, link_is_followed_and_stays) {
  fs::create_directories(folder_ / "real");
  write_file_atomically(folder_ / "real/a", "old");
  fs::create_symlink("real/a", folder_ / "link");
  write_file_atomically(folder_ / "link", "new");
  EXPECT_TRUE(fs::is_symlink(folder_ / "link"));
  EXPECT_EQ(read_file(folder_ / "real/a"), "new");
  fs::create_symlink("real/b", folder_ / "dangling");
  write_file_atomically(folder_ / "dangling", "made");
  EXPECT_TRUE(fs::is_symlink(folder_ / "dangling"));
  EXPECT_EQ(read_file(folder_ / "real/b"), "made");
}

TEST_F(File, what_takes_a_file_s_place_has_its_permissions) {
  write_file_atomically(folder_ / "a", "old");
  fs::permissions(folder_ / "a", fs::perms::owner_read | fs::perms::owner_write);
  write_file_atomically(folder_ / "a", "new");
  EXPECT_EQ(fs::status(folder_ / "a").permissions(), fs::perms::owner_read | fs::perms::owner_write);
}

TEST_F(File, a_pipe_is_refused_and_not_waited_for) {
  ASSERT_EQ(::mkfifo((folder_ / "pipe").c_str(), 0600), 0);
  EXPECT_THROW(read_file(folder_ / "pipe"), ConfigError);
}

TEST_F(File, device_and_pipe_are_written_to_and_stay) {
  write_file_atomically("/dev/null", "gone");
  EXPECT_TRUE(fs::is_character_file("/dev/null"));
  fs::create_symlink("/dev/null", folder_ / "link");
  write_file_atomically(folder_ / "link", "gone");
  EXPECT_TRUE(fs::is_symlink(folder_ / "link"));
  const fs::path pipe = folder_ / "pipe";
  ASSERT_EQ(::mkfifo(pipe.c_str(), 0600), 0);
  const int reader = ::open(pipe.c_str(), O_RDONLY | O_NONBLOCK);
  write_file_atomically(pipe, "through");
  std::string received(7, ' ');
  EXPECT_EQ(::read(reader, received.data(), received.size()), 7);
  EXPECT_EQ(received, "through");
  ::close(reader);
  EXPECT_TRUE(fs::is_fifo(pipe));
  EXPECT_THROW(write_file_atomically(folder_, "a folder"), Error);
}

TEST_F(File, folder_takes_a_name_and_what_was_called_so_is_gone) {
  for (const char* content : {"first", "second"}) {
    fs::create_directory(folder_ / "new");
    write_file_atomically(folder_ / "new" / content, content);
    replace_folder(folder_ / "new", folder_ / "final");
    EXPECT_EQ(read_file(folder_ / "final" / content), content);
    EXPECT_EQ(entries(), 1U);
  }
  EXPECT_FALSE(fs::exists(folder_ / "final" / "first"));
  try {
    replace_folder(folder_ / "none", folder_ / "final");
    FAIL();
  } catch (const Error& error) {
    EXPECT_THAT(error.what(), testing::HasSubstr("none to "));
  }
  EXPECT_EQ(read_file(folder_ / "final" / "second"), "second");
}

TEST_F(File, folder_is_kept_for_one_at_a_time) {
  {
    const FolderLock lock(folder_);
    EXPECT_THROW(FolderLock{folder_}, ConfigError);
  }
  EXPECT_NO_THROW(FolderLock{folder_});
  EXPECT_THROW(FolderLock{folder_ / "none"}, Error);
  EXPECT_EQ(entries(), 0U);
}

TEST_F(File, empty_file_maps_to_no_bytes) {
  write_file_atomically(folder_ / "a", "");
  EXPECT_TRUE(MappedFile(folder_ / "a").bytes().empty());
}

TEST_F(File, checksum_is_xxh3) {
  // XXH3_64bits of no bytes, from the specification's test vectors.
  EXPECT_EQ(checksum({}), "2d06800538d394c2");
}

TEST_F(File, kinds_of_paths) {
  const fs::path file = folder_ / "a";
  write_file_atomically(file, "x");
  EXPECT_TRUE(path_exists(file) && is_file(file) && !is_folder(file));
  EXPECT_TRUE(path_exists(folder_) && is_folder(folder_) && !is_file(folder_));
  EXPECT_FALSE(path_exists(folder_ / "nothing") || is_folder(folder_ / "nothing") ||
               is_file(folder_ / "nothing"));
  EXPECT_FALSE(path_exists(file / "below"));
  EXPECT_THROW(path_exists(folder_ / std::string(300, 'x')), ConfigError);
}

}  // namespace
}  // namespace collegium
