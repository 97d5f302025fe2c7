// SPDX-License-Identifier: Apache-2.0
#include "collegium/moe/routing_record.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/tensor.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

#include "collegium/base/error.h"

namespace collegium {
namespace {

class RoutingRecord : public testing::Test {
 protected:
  void SetUp() override {
    path_ = std::filesystem::temp_directory_path() / "collegium_routing_record_test";
    moe::RoutingRecorder recorder(path_);
    recorder.append({1, 0, 0}, first_, 4);
    recorder.append({1, 0, 1}, second_, 4);
  }
  void TearDown() override { std::filesystem::remove(path_); }

  std::filesystem::path path_;
  at::Tensor first_ = at::tensor({0, 1, 2, 3, -1, 2}, at::kInt).view({3, 2});
  at::Tensor second_ = at::tensor({3, 1, 2, 0, 1, 2}, at::kInt).view({3, 2});
};

TEST_F(RoutingRecord, reads_back_what_was_written) {
  const moe::RoutingReplay replay(path_);
  EXPECT_TRUE(at::equal(replay.ids_TK({1, 0, 0}, 3, 2, 4), first_));
  EXPECT_TRUE(at::equal(replay.ids_TK({1, 0, 1}, 3, 2, 4), second_));
}

TEST_F(RoutingRecord, torn_tail_is_ignored) {
  std::filesystem::resize_file(path_, std::filesystem::file_size(path_) - 3);
  EXPECT_EQ(moe::RoutingReplay(path_).num_records(), 1U);
}

TEST_F(RoutingRecord, mistakes_are_named) {
  const moe::RoutingReplay replay(path_);
  EXPECT_THROW(replay.ids_TK({2, 0, 0}, 3, 2, 4), ConfigError);
  try {
    replay.ids_TK({1, 0, 0}, 5, 2, 4);
    FAIL();
  } catch (const ConfigError& error) {
    EXPECT_THAT(error.what(),
                testing::HasSubstr("holds 3 tokens x 2 of 4 experts, this run needs 5 x 2 of 4"));
  }
}

TEST_F(RoutingRecord, resumed_run_keeps_the_steps_before_and_writes_the_others_again) {
  {
    moe::RoutingRecorder recorder(path_, 1);
    recorder.append({2, 0, 0}, first_, 4);
    recorder.append({3, 0, 0}, first_, 4);
  }
  EXPECT_EQ(moe::RoutingReplay(path_).num_records(), 4U);
  // Killed in the middle of step 3, continued from step 2.
  std::filesystem::resize_file(path_, std::filesystem::file_size(path_) - 3);
  {
    moe::RoutingRecorder recorder(path_, 2);
    recorder.append({3, 0, 0}, second_, 4);
  }
  const moe::RoutingReplay replay(path_);
  EXPECT_EQ(replay.num_records(), 4U);
  EXPECT_TRUE(at::equal(replay.ids_TK({1, 0, 0}, 3, 2, 4), first_));
  EXPECT_TRUE(at::equal(replay.ids_TK({2, 0, 0}, 3, 2, 4), first_));
  EXPECT_TRUE(at::equal(replay.ids_TK({3, 0, 0}, 3, 2, 4), second_));
  {
    const moe::RoutingRecorder started_over(path_);
  }
  EXPECT_EQ(moe::RoutingReplay(path_).num_records(), 0U);
  std::ofstream(path_) << "not a record";
  EXPECT_THROW(moe::RoutingRecorder(path_, 1), ConfigError);
}

TEST_F(RoutingRecord, expert_that_does_not_exist_is_refused) {
  {
    moe::RoutingRecorder recorder(path_);
    recorder.append({1, 0, 0}, at::tensor({0, 1, 2, 4}, at::kInt).view({2, 2}), 4);
  }
  try {
    moe::RoutingReplay(path_).ids_TK({1, 0, 0}, 2, 2, 4);
    FAIL();
  } catch (const ConfigError& error) {
    EXPECT_THAT(error.what(), testing::HasSubstr("layer 0: token 1 goes to expert 4, there are 4"));
  }
}

TEST_F(RoutingRecord, width_is_the_number_of_choices_of_a_token) {
  moe::MoeOptions options;
  options.num_experts = 6;
  options.top_k = 2;
  EXPECT_EQ(moe::record_width(options), 2);
  options.router.selection = moe::Selection::kExpertChoice;
  EXPECT_EQ(moe::record_width(options), 6);
}

TEST_F(RoutingRecord, replayed_file_cannot_be_recorded_to) {
  EXPECT_NO_THROW(moe::require_different_files(path_.string() + "2", path_));
  EXPECT_THROW(moe::require_different_files(path_, path_), ConfigError);
  const std::filesystem::path link = path_.string() + "-link";
  std::filesystem::remove(link);
  std::filesystem::create_symlink(path_, link);
  EXPECT_THROW(moe::require_different_files(link, path_), ConfigError);
  std::filesystem::remove(link);
}

TEST_F(RoutingRecord, full_disk_is_an_error_with_its_reason) {
  if (!std::filesystem::exists("/dev/full")) GTEST_SKIP() << "no /dev/full here";
  moe::RoutingRecorder recorder("/dev/full");
  recorder.append({1, 0, 0}, first_, 4);
  try {
    recorder.flush();
    FAIL();
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(), "cannot write /dev/full: No space left on device");
  }
}

TEST_F(RoutingRecord, corrupt_record_is_refused) {
  {
    std::fstream file(path_, std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(8 + 48 + 4);
    file.put('\x07');
  }
  EXPECT_THROW(moe::RoutingReplay{path_}, ConfigError);
}

TEST_F(RoutingRecord, other_file_is_refused) {
  std::ofstream(path_) << "not a record";
  EXPECT_THROW(moe::RoutingReplay{path_}, ConfigError);
}

}  // namespace
}  // namespace collegium
