// SPDX-License-Identifier: Apache-2.0
#pragma once

// Masters and moments in safetensors files that several ranks write. Entries are called
//   layers.0.attention.q/master               a whole tensor
//   layers.0.moe.gate_up/first_moment[3:6]    experts 3, 4 and 5 of the model, along dim 0
// In which file an entry stands means nothing: a rank takes what it holds from wherever it is.

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "collegium/base/safetensors.h"
#include "collegium/model/checkpoint_io.h"
#include "collegium/optim/master_weights.h"

namespace collegium::train {

/// What     The entries of the slots that a rank writes.
std::vector<std::pair<std::string, at::Tensor>> optimizer_entries(const optim::MasterWeights& masters,
                                                                  const model::ModelShare& share);

class OptimizerFiles {
 public:
  /// Throws   ConfigError naming the file: damaged, or with an entry that is not called as above.
  explicit OptimizerFiles(const std::vector<std::filesystem::path>& paths);

  /// What     Fills the slot's master and moments.
  /// Throws   ConfigError naming the tensor: missing, another shape or dtype; of an expert also its number
  ///          when no entry or more than one has it.
  void load(const optim::Slot& slot) const;

 private:
  // One entry, or a part of a tensor: rows [first, end).
  struct Piece {
    std::size_t file = 0;
    std::string entry;
    std::int64_t first = 0;
    std::int64_t end = 0;
  };

  void add(std::size_t file, const std::string& entry, const TensorInfo& info);
  const std::vector<Piece>& pieces_of(const std::string& tensor) const;
  std::string describe(const Piece& piece) const;
  void load_tensor(const std::string& tensor, const optim::Slot& slot, const at::Tensor& target) const;
  void check_experts(const std::string& tensor, std::int64_t first, std::int64_t end) const;

  std::vector<SafetensorsFile> files_;
  std::map<std::string, std::vector<Piece>> pieces_;  // by name without range
};

}  // namespace collegium::train
