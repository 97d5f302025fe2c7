// SPDX-License-Identifier: Apache-2.0
#include "tests/train/checkpoint_cases.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>

#include <algorithm>

#include "collegium/base/file.h"
#include "collegium/base/rng.h"
#include "collegium/model/tensor_io.h"

namespace collegium::test {

namespace {

constexpr std::int64_t kAll = 0;  // as number of an expert plus one: the tensor belongs to none

// What a tensor holds at `step`: expert by expert, so that it does not depend on who holds which.
at::Tensor expected(std::int64_t step, const std::string& name, const model::Parameter& parameter,
                    at::ScalarType dtype) {
  at::Tensor values = at::empty(parameter.shape, at::kDouble);
  const auto fill = [&](std::int64_t expert_plus_one, const at::Tensor& part) {
    const RandomStream stream(static_cast<std::uint64_t>(step), name,
                              static_cast<std::uint64_t>(expert_plus_one));
    auto* out = part.mutable_data_ptr<double>();
    for (std::int64_t i = 0; i < part.numel(); ++i) out[i] = stream.normal(static_cast<std::uint64_t>(i));
  };
  if (parameter.kind != model::ParameterKind::kExpert) {
    fill(kAll, values);
  } else {
    for (std::int64_t e = 0; e < parameter.shape[0]; ++e) fill(parameter.first_expert + e + 1, values[e]);
  }
  return values.to(dtype);
}

parallel::ParallelOptions with_ep(std::int64_t ep) {
  parallel::ParallelOptions options;
  options.ep = ep;
  return options;
}

std::vector<model::Parameter> make_parameters(const model::ModelConfig& config,
                                              const model::ExpertRange& held, at::ScalarType dtype) {
  auto parameters = model::list_parameters(config, held);
  model::initialize_parameters(config, 1, dtype, parameters);
  return parameters;
}

const model::Parameter& parameter_of(const model::Decoder& decoder, const std::string& name) {
  const auto& parameters = decoder.parameters();
  return *std::find_if(parameters.begin(), parameters.end(), [&](const auto& p) { return p.name == name; });
}

}  // namespace

void TemporaryFolder::SetUp() {
  const testing::TestInfo& info = *testing::UnitTest::GetInstance()->current_test_info();
  folder_ = fs::temp_directory_path() / fmt::format("collegium_{}_{}", info.test_suite_name(), info.name());
  fs::remove_all(folder_);
  fs::create_directories(folder_);
}

model::ModelConfig tiny_config(std::int64_t num_experts) {
  model::ModelConfig c;
  c.family = model::Family::kCollegium;
  c.vocab_size = 29;
  c.hidden_size = 12;
  c.num_layers = 3;
  c.num_heads = 2;
  c.num_kv_heads = 1;
  c.head_dim = 6;
  c.dense_ffn_size = 10;
  c.max_positions = 32;
  c.moe_layers = {true, false, true};
  c.moe.num_experts = num_experts;
  c.moe.top_k = 2;
  c.moe.ffn_size = 8;
  c.moe.shared_expert.kind = moe::SharedExpert::kGated;
  c.moe.shared_expert.ffn_size = 7;
  c.moe.router.bias_balancing = true;
  return c;
}

Rank::Rank(comm::Communicator& world, std::int64_t ep, std::int64_t num_experts, at::ScalarType dtype,
           std::int64_t step)
    : groups(parallel::make_groups(world.shared_from_this(), with_ep(ep), tiny_config(num_experts).moe)),
      decoder(tiny_config(num_experts),
              make_parameters(tiny_config(num_experts), groups.held_experts(), dtype),
              parallel::make_transport(groups, with_ep(ep))),
      masters(decoder.parameters()) {
  const at::NoGradGuard no_grad;
  for (optim::Slot& slot : masters.slots()) {
    const model::Parameter& parameter = parameter_of(decoder, slot.name);
    const auto fill = [&](const char* part, at::Tensor& tensor) {
      tensor.copy_(expected(step, slot.name + part, parameter, tensor.scalar_type()));
    };
    fill("/master", slot.master);
    fill("/first", slot.first_moment);
    fill("/second", slot.second_moment);
  }
  masters.write_values();
  for (model::Parameter& parameter : decoder.parameters()) {
    if (parameter.kind == model::ParameterKind::kBuffer)
      parameter.value.copy_(expected(step, parameter.name, parameter, parameter.value.scalar_type()));
  }
}

optim::Slot& Rank::slot(const std::string& name) {
  const auto found = std::find_if(masters.slots().begin(), masters.slots().end(),
                                  [&](const auto& s) { return s.name == name; });
  COLLEGIUM_CHECK(found != masters.slots().end(), "no slot {}", name);
  return *found;
}

void Rank::expect_state(std::int64_t step) {
  const auto same = [&](const std::string& name, const model::Parameter& parameter,
                        const at::Tensor& tensor) {
    EXPECT_TRUE(at::equal(tensor, expected(step, name, parameter, tensor.scalar_type())))
        << name << " on rank " << groups.world_rank();
  };
  for (const optim::Slot& slot : masters.slots()) {
    const model::Parameter& parameter = parameter_of(decoder, slot.name);
    same(slot.name + "/master", parameter, slot.master);
    same(slot.name + "/first", parameter, slot.first_moment);
    same(slot.name + "/second", parameter, slot.second_moment);
    EXPECT_TRUE(at::equal(slot.value, slot.master.to(slot.value.scalar_type()))) << slot.name;
  }
  for (const model::Parameter& parameter : decoder.parameters()) {
    if (parameter.kind == model::ParameterKind::kBuffer) same(parameter.name, parameter, parameter.value);
  }
}

train::TrainingState state_of(std::int64_t step) {
  return {.step = step,
          .samples = 10 * step,
          .tokens = 100 * step,
          .elapsed_seconds = 0.5,
          .run_config = {{"train", {{"seed", 3}}}}};
}

void save(const fs::path& run_folder, const Layout& layout, std::int64_t num_experts, at::ScalarType dtype,
          std::int64_t step, std::int64_t keep_last) {
  fs::create_directories(run_folder);
  const train::CompanionFile tokenizer{.name = "tokenizer.model", .content = "pieces"};
  comm::run_ranks(layout.ranks, [&](comm::Communicator& world) {
    const Rank rank(world, layout.ep, num_experts, dtype, step);
    const fs::path path = train::save_checkpoint(run_folder, rank.decoder, rank.masters, state_of(step),
                                                 {tokenizer}, keep_last, rank.groups);
    EXPECT_EQ(path, run_folder / fmt::format("step-{:08}", step));
  });
}

void load_and_compare(const fs::path& checkpoint, const Layout& layout, std::int64_t num_experts,
                      at::ScalarType dtype, std::int64_t step) {
  comm::run_ranks(layout.ranks, [&](comm::Communicator& world) {
    Rank rank(world, layout.ep, num_experts, dtype, step + 1000);
    const train::TrainingState state =
        train::load_checkpoint(checkpoint, rank.decoder, rank.masters, rank.groups);
    rank.expect_state(step);
    const train::TrainingState wanted = state_of(step);
    EXPECT_EQ(state.step, wanted.step);
    EXPECT_EQ(state.samples, wanted.samples);
    EXPECT_EQ(state.tokens, wanted.tokens);
    EXPECT_EQ(state.elapsed_seconds, wanted.elapsed_seconds);
    EXPECT_EQ(state.run_config, wanted.run_config);
  });
}

std::set<std::string> file_names(const fs::path& folder) {
  std::set<std::string> names;
  for (const auto& entry : fs::recursive_directory_iterator(folder)) {
    if (entry.is_regular_file()) names.insert(fs::relative(entry.path(), folder).string());
  }
  return names;
}

std::set<std::string> folders(const fs::path& folder) {
  std::set<std::string> names;
  for (const auto& entry : fs::directory_iterator(folder)) {
    if (entry.is_directory()) names.insert(entry.path().filename().string());
  }
  return names;
}

Json read_json(const fs::path& file) { return Json::parse(read_file(file)); }

void edit_json(const fs::path& file, const std::function<void(Json&)>& edit) {
  Json json = read_json(file);
  edit(json);
  write_file_atomically(file, json.dump(1));
}

void edit_tensors(const fs::path& checkpoint, const std::string& name,
                  const std::function<void(NamedTensors&)>& edit) {
  const SafetensorsFile file(checkpoint / name);
  NamedTensors tensors;
  for (const auto& [tensor, info] : file.tensors())
    tensors.emplace_back(tensor, model::read_tensor(file, tensor));
  edit(tensors);
  model::write_tensors(checkpoint / name, tensors);
  edit_json(checkpoint / "training/manifest.json", [&](Json& manifest) {
    manifest["files"][name] = {{"bytes", fs::file_size(checkpoint / name)},
                               {"xxh3", checksum_file(checkpoint / name)}};
  });
}

}  // namespace collegium::test
