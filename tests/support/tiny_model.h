// SPDX-License-Identifier: Apache-2.0
#pragma once

// A model and a corpus small enough for every test to train.

#include <cmath>
#include <filesystem>
#include <string>

#include "collegium/base/safetensors.h"
#include "collegium/data/prepare.h"

namespace collegium::test {

/// Two domains of token ids that an n-gram model can learn: counting up, and counting down, modulo
/// `vocab_size`.
inline void write_counting_corpus(const std::filesystem::path& folder, std::int64_t vocab_size) {
  std::filesystem::create_directories(folder);
  data::PrepareOptions options{.out = folder / "data",
                               .texts = {},
                               .token_files = {},
                               .tokenizer = {},
                               .vocab_size = vocab_size,
                               .validation_fraction = 0.1,
                               .force = true};
  for (const std::string name : {"up", "down"}) {
    constexpr std::int64_t kTokens = 3000;
    std::vector<std::int64_t> ids;
    for (std::int64_t i = 0; i < kTokens; ++i)
      ids.push_back(name == "up" ? i % vocab_size : (kTokens - i) % (vocab_size - 1));
    const auto file = folder / (name + ".safetensors");
    write_safetensors(file, {{.name = "input_ids", .dtype = "I64", .shape = {kTokens}, .bytes = [&] {
                                const auto bytes = std::as_bytes(std::span(ids));
                                return std::vector<std::byte>(bytes.begin(), bytes.end());
                              }}});
    options.token_files.push_back({.domain = name, .path = file});
  }
  data::prepare(options, [](const std::string&) {});
}

/// A run file with everything switched on: capacity with drops, jitter, balance losses, gradient
/// accumulation.
inline std::string tiny_run_file(const std::filesystem::path& folder) {
  return "run_folder = \"" + (folder / "run").string() + "\"\n[data]\npath = \"" +
         (folder / "data").string() + R"("
sequence_length = 12
[batch]
global_batch = 6
micro_sequences = 3
[train]
steps = 6
dtype = "float64"
seed = 3
[model]
family = "mixtral"
hidden_size = 16
num_layers = 2
num_heads = 2
num_kv_heads = 1
max_positions = 64
[model.moe]
num_experts = 4
top_k = 2
ffn_size = 8
[model.moe.router]
noise = "jitter_router"
[model.moe.capacity]
drop_policy = "position"
factor = "1.0"
min_capacity = 1
[model.moe.balance]
load_balance = 0.05
load_balance_scope = "sequence"
z_loss = 0.01
[optimizer]
learning_rate = 0.01
[checkpoint]
every_steps = 2
[validation]
sequences = 4
)";
}

}  // namespace collegium::test
