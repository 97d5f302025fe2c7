// SPDX-License-Identifier: Apache-2.0
#pragma once

// Ranks with a tiny model whose every value is known, for tests of checkpoints.

#include <ATen/core/Tensor.h>
#include <gtest/gtest.h>

#include <atomic>
#include <filesystem>
#include <functional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "collegium/base/error.h"
#include "collegium/comm/local/local.h"
#include "collegium/train/checkpoint.h"

namespace collegium::test {

namespace fs = std::filesystem;
using NamedTensors = std::vector<std::pair<std::string, at::Tensor>>;

struct Layout {
  int ranks = 1;
  int ep = 1;
};

/// A folder that ends with the test.
class TemporaryFolder : public testing::Test {
 protected:
  void SetUp() override;
  void TearDown() override { fs::remove_all(folder_); }
  const fs::path& folder() const { return folder_; }

 private:
  fs::path folder_;
};

/// Experts in layers 0 and 2, a dense layer between them, a shared expert, expert biases (buffers).
model::ModelConfig tiny_config(std::int64_t num_experts);

/// One rank's model and optimizer state as they are at `step`.
struct Rank {
  Rank(comm::Communicator& world, std::int64_t ep, std::int64_t num_experts, at::ScalarType dtype,
       std::int64_t step);

  optim::Slot& slot(const std::string& name);
  /// Every value, master, moment and buffer is bit for bit that of `step`.
  void expect_state(std::int64_t step);

  parallel::Groups groups;
  model::Decoder decoder;
  optim::MasterWeights masters;
};

train::TrainingState state_of(std::int64_t step);

/// The ranks of a layout save RUN/step-N, with a tokenizer.
void save(const fs::path& run_folder, const Layout& layout, std::int64_t num_experts, at::ScalarType dtype,
          std::int64_t step, std::int64_t keep_last = 2);
/// The ranks of a layout, in another state before, load the checkpoint; all of it must be as at `step`.
void load_and_compare(const fs::path& checkpoint, const Layout& layout, std::int64_t num_experts,
                      at::ScalarType dtype, std::int64_t step);

/// Relative names of a folder's files, and names of the folders in it.
std::set<std::string> file_names(const fs::path& folder);
std::set<std::string> folders(const fs::path& folder);

Json read_json(const fs::path& file);
void edit_json(const fs::path& file, const std::function<void(Json&)>& edit);
/// Changes a safetensors file of a checkpoint, and the manifest with it.
void edit_tensors(const fs::path& checkpoint, const std::string& name,
                  const std::function<void(NamedTensors&)>& edit);

/// fn must fail on every rank, as a whole with an E that contains `text`, long before the time-out.
template <typename E>
void expect_failure(int num_ranks, const std::string& text,
                    const std::function<void(comm::Communicator&)>& fn) {
  constexpr std::chrono::seconds kTimeout(60);
  std::atomic<int> failed = 0;
  const auto begin = std::chrono::steady_clock::now();
  try {
    comm::run_ranks(num_ranks,
                    [&](comm::Communicator& world) {
                      try {
                        fn(world);
                      } catch (...) {
                        ++failed;
                        throw;
                      }
                    },
                    {.timeout = kTimeout, .ranks_per_node = 0});
    ADD_FAILURE() << "no error";
  } catch (const E& error) {
    EXPECT_NE(std::string(error.what()).find(text), std::string::npos) << error.what();
  }
  EXPECT_EQ(failed, num_ranks);
  EXPECT_LT(std::chrono::steady_clock::now() - begin, kTimeout / 2);
}

}  // namespace collegium::test
