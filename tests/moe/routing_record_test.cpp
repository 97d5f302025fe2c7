// SPDX-License-Identifier: Apache-2.0
#include "collegium/moe/routing_record.h"

#include <ATen/ATen.h>
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
