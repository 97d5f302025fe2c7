// SPDX-License-Identifier: Apache-2.0
#pragma once

// What a few steps of training came to, whole, so that runs under different layouts can be compared.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "collegium/comm/communicator.h"
#include "collegium/train/trainer.h"

namespace collegium::train {

/// Norms, by name of a gradient, below which a difference is not taken relative to the gradient's own.
using LeastNorms = std::map<std::string, double>;

struct Snapshot {
  std::vector<double> losses;  ///< per step: cross-entropy and balance losses
  std::vector<double> norms;   ///< per step: global gradient norm
  /// "step 2: layers.0.moe.down": every trained parameter with all its experts, before clipping.
  std::map<std::string, at::Tensor> gradients;
  std::map<std::string, at::Tensor> parameters;  ///< masters after the last step
  LeastNorms least_norms;   ///< for comparisons with this one, where it is a reference: least_norms_of()
  bool ranks_agree = true;  ///< replicas of gradients, weights and the norm are bit-identical on all ranks
};

/// Routing to write or to replay, one of them or none.
struct RoutingFiles {
  std::filesystem::path record;
  std::filesystem::path replay;
};

/// What     Trains `steps` steps under config.parallel.
/// Comm     collective over `world`.
/// Returns  complete on every rank of the first expert-data-parallel copy (rank 0 is one).
Snapshot take_snapshot(const RunConfig& config, const std::shared_ptr<comm::Communicator>& world,
                       std::int64_t steps, const RoutingFiles& routing = {});

/// ||a - b|| / max(||b||, least), and ||a - b|| where that is below 1e-12.
double norm_difference(const at::Tensor& a, const at::Tensor& b, double least = 0.0);

/// The largest differences between two snapshots, and where they are.
struct Difference {
  double loss = 0.0;
  double gradient = 0.0;
  double parameter = 0.0;
  double norm = 0.0;
  std::string worst_gradient;
  std::string worst_parameter;

  double largest() const;
};
/// What     How far a snapshot is from the reference, tensor by tensor.
Difference compare(const Snapshot& snapshot, const Snapshot& reference);

/// What     The least norms for comparisons with `rounded`: parts of a gradient may cancel, such as a key's
///          where a query sees one key alone, and what is left is their rounding.
/// Math     4 ||rounded - exact|| / bound: another run's roundings are of the size of this one's, and they
///          differ by 4 standard deviations at most.
LeastNorms least_norms_of(const Snapshot& rounded, const Snapshot& exact, double bound);

/// What     Whether two snapshots are the same bits.
bool bit_identical(const Snapshot& a, const Snapshot& b);

}  // namespace collegium::train
