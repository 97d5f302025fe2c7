// SPDX-License-Identifier: Apache-2.0
#pragma once

// A run small enough for every test to train.

#include <filesystem>
#include <string>

namespace collegium::test {

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
