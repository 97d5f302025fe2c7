// SPDX-License-Identifier: Apache-2.0
// Checkpoints written by any ranks and read by any others. Every value is a function of (step, name, expert,
// index), so what a rank must find needs no second run.
#include "collegium/train/checkpoint.h"

#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>
#include <sys/mount.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <fstream>
#include <thread>

#include "collegium/base/file.h"
#include "collegium/model/tensor_io.h"
#include "tests/train/checkpoint_cases.h"

namespace collegium::test {
namespace {

class Checkpoints : public TemporaryFolder {};

// Writes step 7 under one layout and reads it under all of them.
void write_and_read(const fs::path& folder, const std::vector<Layout>& layouts, std::int64_t num_experts,
                    at::ScalarType dtype) {
  for (const Layout& writer : layouts) {
    const fs::path run = folder / fmt::format("{}-{}", writer.ranks, writer.ep);
    save(run, writer, num_experts, dtype, 7);
    const fs::path checkpoint = *train::find_latest_checkpoint(run);
    EXPECT_EQ(checkpoint.filename(), "step-00000007");
    for (const Layout& reader : layouts) {
      SCOPED_TRACE(fmt::format("{} experts, written by {} ranks with ep {}, read by {} with ep {}",
                               num_experts, writer.ranks, writer.ep, reader.ranks, reader.ep));
      load_and_compare(checkpoint, reader, num_experts, dtype, 7);
    }
  }
}

TEST_F(Checkpoints, are_read_by_every_layout) {
  const std::vector<Layout> layouts = {{1, 1}, {2, 1}, {2, 2}, {4, 2}, {3, 3}, {4, 4}};
  write_and_read(folder() / "float64", layouts, 6, at::kDouble);
  write_and_read(folder() / "bfloat16", layouts, 6, at::kBFloat16);
}

TEST_F(Checkpoints, are_read_where_ranks_do_not_divide_the_experts) {
  const std::vector<Layout> layouts = {{1, 1}, {2, 2}, {3, 3}, {4, 4}, {4, 2}};
  write_and_read(folder() / "float64", layouts, 5, at::kDouble);
  write_and_read(folder() / "bfloat16", layouts, 5, at::kBFloat16);
}

// Four ranks, two copies of the experts: the first two ranks write, each one shard.
TEST_F(Checkpoints, hold_every_tensor_once_and_in_the_index) {
  save(folder(), {4, 2}, 6, at::kBFloat16, 1);
  const fs::path checkpoint = folder() / "step-00000001";
  EXPECT_EQ(file_names(checkpoint),
            (std::set<std::string>{"config.json", "model-00001-of-00002.safetensors",
                                   "model-00002-of-00002.safetensors", "model.safetensors.index.json",
                                   "tokenizer.model", "training/manifest.json",
                                   "training/optimizer-00000.safetensors",
                                   "training/optimizer-00001.safetensors", "training/state.json"}));
  const Json index = read_json(checkpoint / "model.safetensors.index.json");
  std::map<std::string, std::string> found;
  for (const char* name : {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}) {
    const SafetensorsFile file(checkpoint / name);
    for (const auto& [tensor, info] : file.tensors())
      EXPECT_TRUE(found.emplace(tensor, name).second) << tensor;
  }
  EXPECT_EQ(found, (index["weight_map"].get<std::map<std::string, std::string>>()));
  const auto config = tiny_config(6);
  EXPECT_EQ(found.size(), model::list_disk_tensors(config, model::list_parameters(config)).size());

  save(folder(), {2, 1}, 6, at::kBFloat16, 2);
  EXPECT_EQ(
      file_names(folder() / "step-00000002"),
      (std::set<std::string>{"config.json", "model.safetensors", "tokenizer.model", "training/manifest.json",
                             "training/optimizer-00000.safetensors", "training/state.json"}));
}

TEST_F(Checkpoints, are_byte_for_byte_the_same_when_written_again) {
  save(folder() / "a", {3, 3}, 5, at::kBFloat16, 1);
  save(folder() / "b", {3, 3}, 5, at::kBFloat16, 1);
  save(folder() / "b", {3, 3}, 5, at::kBFloat16, 1);  // in place of the same step
  const fs::path a = folder() / "a/step-00000001";
  const fs::path b = folder() / "b/step-00000001";
  ASSERT_EQ(file_names(a), file_names(b));
  for (const std::string& name : file_names(a)) EXPECT_EQ(read_file(a / name), read_file(b / name)) << name;
  EXPECT_EQ(folders(folder() / "b"), std::set<std::string>{"step-00000001"});
}

// Entries without a range are whole: experts of all ranks under one name.
TEST_F(Checkpoints, may_hold_all_experts_in_one_entry) {
  save(folder(), {1, 1}, 6, at::kBFloat16, 7);
  const fs::path checkpoint = folder() / "step-00000007";
  edit_tensors(checkpoint, "training/optimizer-00000.safetensors", [](NamedTensors& tensors) {
    for (auto& [name, tensor] : tensors) name = name.substr(0, name.find('['));
  });
  load_and_compare(checkpoint, {3, 3}, 6, at::kBFloat16, 7);
}

TEST_F(Checkpoints, of_older_steps_are_pruned_and_leftovers_passed_over) {
  for (const std::int64_t step : {1, 2, 3, 4}) save(folder(), {2, 2}, 6, at::kBFloat16, step);
  fs::create_directories(folder() / "step-00000009.tmp-1/training");
  fs::create_directories(folder() / "step-00000008");
  EXPECT_EQ(train::find_latest_checkpoint(folder())->filename(), "step-00000004");
  train::remove_temporary_folders(folder());
  EXPECT_EQ(folders(folder()), (std::set<std::string>{"step-00000003", "step-00000004", "step-00000008"}));
  // A kill between the two renames of a file system that cannot exchange names.
  fs::rename(folder() / "step-00000004", folder() / "step-00000004.tmp-1-replaced");
  fs::create_directories(folder() / "step-00000004.tmp-1");
  fs::create_directories(folder() / "step-00000003.tmp-1-replaced");
  train::remove_temporary_folders(folder());
  EXPECT_EQ(folders(folder()), (std::set<std::string>{"step-00000003", "step-00000004", "step-00000008"}));
  EXPECT_EQ(train::find_latest_checkpoint(folder())->filename(), "step-00000004");
  fs::create_directories(folder() / "step-00000009.tmp-1/training");
  fs::create_directories(folder() / "step-00000004-best");
  train::remove_checkpoints(folder());
  EXPECT_EQ(folders(folder()), std::set<std::string>{"step-00000004-best"})
      << "what is not a run's own stays";
}

class DamagedCheckpoint : public TemporaryFolder {
 protected:
  void SetUp() override {
    TemporaryFolder::SetUp();
    save(folder(), {4, 4}, 6, at::kBFloat16, 7);
  }
  fs::path checkpoint() const { return folder() / "step-00000007"; }
  // Loads on three ranks; the error must be the one of the files, on all of them.
  void expect_refused(const std::string& text) const {
    expect_failure<ConfigError>(3, text, [this](comm::Communicator& world) {
      Rank rank(world, 3, 6, at::kBFloat16, 0);
      train::load_checkpoint(checkpoint(), rank.decoder, rank.masters, rank.groups);
    });
  }
};

constexpr const char* kShard = "model-00003-of-00004.safetensors";
constexpr const char* kOptimizer = "training/optimizer-00002.safetensors";

TEST_F(DamagedCheckpoint, missing_files_are_named) {
  fs::remove(checkpoint() / kOptimizer);
  expect_refused(std::string(kOptimizer) + " is missing");
}

TEST_F(DamagedCheckpoint, truncated_files_are_named) {
  const std::string content = read_file(checkpoint() / kShard);
  write_file_atomically(checkpoint() / kShard, content.substr(0, content.size() - 5));
  expect_refused(
      fmt::format("{} has {} bytes, the manifest says {}", kShard, content.size() - 5, content.size()));
}

TEST_F(DamagedCheckpoint, a_flipped_bit_in_any_file_is_named) {
  for (const std::string& name : file_names(checkpoint())) {
    if (name == "training/manifest.json") continue;
    const std::string content = read_file(checkpoint() / name);
    std::string damaged = content;
    damaged[damaged.size() / 2] = static_cast<char>(damaged[damaged.size() / 2] ^ 1);
    write_file_atomically(checkpoint() / name, damaged);
    expect_refused(name + " is damaged or was changed");
    write_file_atomically(checkpoint() / name, content);
  }
  load_and_compare(checkpoint(), {3, 3}, 6, at::kBFloat16, 7);
}

TEST_F(DamagedCheckpoint, missing_experts_are_named) {
  edit_tensors(checkpoint(), kOptimizer, [](NamedTensors& tensors) {
    std::erase_if(tensors, [](const auto& t) { return t.first == "layers.2.moe.down/first_moment[4:5]"; });
  });
  expect_refused("layers.2.moe.down/first_moment: expert 4 is in no optimizer file");
}

TEST_F(DamagedCheckpoint, experts_that_are_there_twice_are_named) {
  edit_tensors(checkpoint(), kOptimizer, [](NamedTensors& tensors) {
    tensors.emplace_back("layers.0.moe.down/master[1:2]", at::zeros({1, 12, 8}));
  });
  expect_refused("layers.0.moe.down/master: expert 1 is in 'layers.0.moe.down/master[0:2]'");
}

TEST_F(DamagedCheckpoint, whole_tensors_that_are_missing_or_there_twice_are_named) {
  edit_tensors(checkpoint(), "training/optimizer-00000.safetensors", [](NamedTensors& tensors) {
    std::erase_if(tensors, [](const auto& t) { return t.first == "norm/second_moment"; });
  });
  expect_refused("norm/second_moment: is in 0 optimizer files, must be in one");
  edit_tensors(checkpoint(), kOptimizer, [](NamedTensors& tensors) {
    tensors.emplace_back("norm/second_moment", at::zeros({12}));
    tensors.emplace_back("embed_tokens/master", at::zeros({29, 12}));
  });
  expect_refused("embed_tokens/master: is in 2 optimizer files, must be in one");
}

TEST_F(DamagedCheckpoint, malformed_entries_are_named) {
  for (const char* name :
       {"a/master[1:3]", "a/master[-1:0]", "a/master[1:2", "a/master[1:2]x", "a/master[:]"}) {
    edit_tensors(checkpoint(), kOptimizer,
                 [&](NamedTensors& tensors) { tensors.emplace_back(name, at::zeros({1, 2})); });
    expect_refused(fmt::format("entry '{}' is not called", name));
    edit_tensors(checkpoint(), kOptimizer, [&](NamedTensors& tensors) {
      std::erase_if(tensors, [&](const auto& t) { return t.first == name; });
    });
  }
}

TEST_F(DamagedCheckpoint, tensors_of_another_model_are_named) {
  edit_tensors(checkpoint(), kOptimizer, [](NamedTensors& tensors) {
    for (auto& [name, tensor] : tensors) {
      if (name == "layers.0.moe.down/master[4:5]") tensor = tensor.narrow(1, 0, 11);
    }
  });
  expect_refused("has another shape or dtype than the model of this run");
}

TEST_F(DamagedCheckpoint, edited_weights_are_refused) {
  edit_tensors(checkpoint(), kShard, [](NamedTensors& tensors) { tensors[0].second.add_(1.0); });
  expect_refused("are not its rounded masters; start from the weights alone with --weights-only");
}

TEST_F(DamagedCheckpoint, shards_that_only_the_index_names_are_an_error) {
  edit_json(checkpoint() / "training/manifest.json", [](Json& manifest) { manifest["files"].erase(kShard); });
  fs::remove(checkpoint() / kShard);
  expect_refused(fmt::format("names the shard {}, which is missing", kShard));
}

TEST_F(DamagedCheckpoint, files_that_the_manifest_does_not_list_are_not_read) {
  edit_json(checkpoint() / "training/manifest.json",
            [](Json& manifest) { manifest["files"].erase(kOptimizer); });
  expect_refused("moe.gate_up/master: expert 4 is in no optimizer file");
}

class FailedSave : public TemporaryFolder {
 protected:
  // Four ranks save step 8 beside step 7; `change` may spoil a rank first. Step 7 must stay all there is.
  template <typename E>
  void expect_failed(const std::string& text, const std::function<void(Rank&)>& change,
                     const std::vector<train::CompanionFile>& companions = {}) const {
    save(folder(), {4, 2}, 6, at::kBFloat16, 7);
    expect_failure<E>(4, text, [&](comm::Communicator& world) {
      Rank rank(world, 2, 6, at::kBFloat16, 8);
      change(rank);
      train::save_checkpoint(folder(), rank.decoder, rank.masters, state_of(8), companions, 2, rank.groups);
    });
    EXPECT_EQ(folders(folder()), std::set<std::string>{"step-00000007"});
    load_and_compare(folder() / "step-00000007", {2, 2}, 6, at::kBFloat16, 7);
  }
};

TEST_F(FailedSave, parameter_that_is_not_finite) {
  expect_failed<Error>("rank 3 of 4: parameter layers.2.moe.down is not finite: no checkpoint is written",
                       [](Rank& rank) {
                         if (rank.groups.world_rank() != 3) return;
                         rank.slot("layers.2.moe.down").master.fill_(std::nan(""));
                       });
}

TEST_F(FailedSave, rank_that_cannot_write_its_part) {
  expect_failed<ConfigError>("rank 1 of 4: safetensors has no dtype for ComplexFloat", [](Rank& rank) {
    if (rank.groups.world_rank() != 1) return;
    at::Tensor& master = rank.slot("layers.0.moe.gate_up").master;
    master = master.to(at::kComplexFloat);
  });
}

TEST_F(FailedSave, root_that_cannot_commit) {
  expect_failed<Error>("rank 0 of 4: cannot write", [](Rank&) {},
                       {{.name = "no_such_folder/tokenizer.model", .content = "pieces"}});
}

TEST_F(FailedSave, file_in_place_of_the_run_folder) {
  std::ofstream(folder() / "run") << "a file";
  expect_failure<Error>(3, "Not a directory", [this](comm::Communicator& world) {
    Rank rank(world, 3, 6, at::kBFloat16, 8);
    train::save_checkpoint(folder() / "run", rank.decoder, rank.masters, state_of(8), {}, 2, rank.groups);
  });
  EXPECT_TRUE(fs::is_regular_file(folder() / "run"));
}

// A disk of 1 MiB; not mounted where that is not allowed.
class SmallDisk {
 public:
  explicit SmallDisk(fs::path path) : path_(std::move(path)) {
    fs::create_directories(path_);
    mounted_ = ::mount("tmpfs", path_.c_str(), "tmpfs", 0, "size=1m") == 0;
  }
  ~SmallDisk() {
    if (mounted_) ::umount(path_.c_str());
  }
  SmallDisk(const SmallDisk&) = delete;
  SmallDisk& operator=(const SmallDisk&) = delete;

  bool mounted() const { return mounted_; }
  const fs::path& path() const { return path_; }

 private:
  fs::path path_;
  bool mounted_ = false;
};

TEST_F(FailedSave, full_disk_leaves_the_older_checkpoints) {
  const SmallDisk disk(folder() / "disk");
  if (!disk.mounted()) GTEST_SKIP() << "a tmpfs cannot be mounted";
  std::int64_t step = 1;
  const auto fits = [&] {
    try {
      save(disk.path(), {3, 3}, 6, at::kBFloat16, step, /*keep_last=*/0);
      return true;
    } catch (const Error& error) {
      EXPECT_NE(std::string(error.what()).find("No space left on device"), std::string::npos) << error.what();
      return false;
    }
  };
  while (step < 1000 && fits()) ++step;
  EXPECT_GT(step, 1);
  EXPECT_EQ(static_cast<std::int64_t>(folders(disk.path()).size()), step - 1);
  for (std::int64_t saved = 1; saved < step; ++saved)
    load_and_compare(disk.path() / fmt::format("step-{:08}", saved), {2, 2}, 6, at::kBFloat16, saved);
}

constexpr const char* kTarget = "COLLEGIUM_TEST_SAVE_INTO";

// The process that the next test kills.
TEST(KilledChild, DISABLED_saves_until_killed) {
  const fs::path run = std::getenv(kTarget);  // NOLINT(concurrency-mt-unsafe)
  train::remove_temporary_folders(run);
  const auto latest = train::find_latest_checkpoint(run);
  std::int64_t step = latest ? std::stoll(latest->filename().string().substr(5)) + 1 : 1;
  while (true) save(run, {4, 2}, 6, at::kBFloat16, step++);
}

class KilledSave : public TemporaryFolder {
 protected:
  ::pid_t start_child() const {
    const ::pid_t child = ::fork();
    if (child != 0) return child;
    ::setenv(kTarget, folder().c_str(), 1);  // NOLINT(concurrency-mt-unsafe)
    ::execl("/proc/self/exe", "test", "--gtest_filter=KilledChild.DISABLED_saves_until_killed",
            "--gtest_also_run_disabled_tests", "--gtest_brief=1", nullptr);
    ::_exit(127);
  }
};

// Files of checkpoints that are being written; 0 when the folder changes under our eyes.
std::size_t files_under_way(const fs::path& run) {
  std::size_t count = 0;
  try {
    for (const std::string& name : file_names(run)) count += name.find(".tmp-") != std::string::npos ? 1 : 0;
  } catch (const fs::filesystem_error&) {
    return 0;
  }
  return count;
}

// Killed when 1, 2, ... files of a later checkpoint are there, so at different places of a save.
TEST_F(KilledSave, leaves_checkpoints_that_load) {
  int interrupted = 0;
  for (std::size_t kill = 1; kill <= 8; ++kill) {
    const auto before = train::find_latest_checkpoint(folder());
    const ::pid_t child = start_child();
    const auto too_early = [&] {
      return train::find_latest_checkpoint(folder()) == before || files_under_way(folder()) < kill;
    };
    while (too_early() && ::waitpid(child, nullptr, WNOHANG) == 0)
      std::this_thread::sleep_for(std::chrono::microseconds(100));
    ::kill(child, SIGKILL);
    int status = 0;
    ASSERT_EQ(::waitpid(child, &status, 0), child);
    EXPECT_TRUE(WIFSIGNALED(status));
    if (files_under_way(folder()) > 0) ++interrupted;
    const auto latest = train::find_latest_checkpoint(folder());
    ASSERT_TRUE(latest.has_value());
    EXPECT_NE(latest, before);
    load_and_compare(*latest, {3, 3}, 6, at::kBFloat16, std::stoll(latest->filename().string().substr(5)));
  }
  EXPECT_GT(interrupted, 0);
}

}  // namespace
}  // namespace collegium::test
