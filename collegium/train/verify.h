// SPDX-License-Identifier: Apache-2.0
#pragma once

// Proof that the layout does not change what is computed: the same steps on one rank and under every layout
// of the ranks at hand.

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "collegium/base/fields.h"
#include "collegium/comm/communicator.h"
#include "collegium/train/run_config.h"
#include "collegium/train/snapshot.h"

namespace collegium::train {

/// One comparison with the one-rank run.
struct VerifyRow {
  std::string section;  ///< "layouts", "options", "bfloat16"
  std::string layout;
  Difference difference;
  double bound = 0.0;
  bool ranks_agree = true;
  bool rerun_identical = true;  ///< where it was run twice
  bool passed = false;
};
/// The row as `verify --json` prints it.
Json row_json(const VerifyRow& row);

struct VerifyRequest {
  std::optional<RunConfig> config;  ///< a run of the user's; absent: the built-in one and its options
  std::int64_t steps = 2;
  std::function<void(const VerifyRow&)> on_row;  ///< called on rank 0 as results come
};

/// float64, norm-wise: what layouts may differ by.
inline constexpr double kExactBound = 1e-11;

/// What     By how much loss and gradients of one step in a low precision may differ between two runs that
///          only add in another order, routing being equal.
/// Math     4 eps sqrt(n), n roundings on the longest path through forward and backward: 30 per layer and 4
///          of the head; roundings are independent, so their root counts, and 4 standard deviations are
///          allowed. eps is half the distance of neighbouring numbers: 2^-8 in bf16, 2^-24 in fp32. A
///          gradient that is smaller than what was summed up for it is held against its own rounding:
///          least_norms_of().
double low_precision_bound(at::ScalarType dtype, std::int64_t num_layers);

/// What     Runs all comparisons. float64: every layout, then option sets; then one step in the run's own
///          dtype with the one-rank run's routing replayed.
/// Comm     collective over `world`.
/// Returns  whether all passed, the same on all ranks.
bool verify(const VerifyRequest& request, const std::shared_ptr<comm::Communicator>& world);

}  // namespace collegium::train
