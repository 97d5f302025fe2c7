// SPDX-License-Identifier: Apache-2.0
#pragma once

// A test of training: a folder of its own with the counting corpus and the tiny run file.

#include <gtest/gtest.h>

#include <filesystem>
#include <string>

#include "collegium/base/file.h"
#include "collegium/data/made_corpus.h"
#include "tests/support/tiny_run_file.h"

namespace collegium::test {

class TinyRun : public testing::Test {
 protected:
  static constexpr std::int64_t kVocabulary = 24;

  void SetUp() override {
    folder_ = std::filesystem::temp_directory_path() /
              ("collegium_" + std::string(testing::UnitTest::GetInstance()->current_test_info()->name()));
    std::filesystem::remove_all(folder_);
    data::prepare_made_corpus(folder_, data::counting_domains(kVocabulary), kVocabulary, 0.1);
    write_file_atomically(folder_ / "run.toml", tiny_run_file(folder_));
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }

  std::filesystem::path folder_;
};

}  // namespace collegium::test
