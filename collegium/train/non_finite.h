// SPDX-License-Identifier: Apache-2.0
#pragma once

// Why a loss is not a number.

#include <cstdint>
#include <span>

#include "collegium/model/decoder.h"
#include "collegium/moe/balance.h"
#include "collegium/parallel/groups.h"
#include "collegium/train/batch.h"

namespace collegium::train {

/// The losses of a micro-step of which one is not finite.
struct NonFiniteLoss {
  std::int64_t step = 0;
  double local_cross_entropy = 0.0;  ///< sum over this rank's targets
  double cross_entropy = 0.0;        ///< over those of all ranks
  const moe::BalanceLoss& balance;
  std::span<const moe::LayerStatistics> layers;
};

/// What     Runs the micro-step's forward pass again and looks at everything that it computes.
/// Comm     collective over the world. The rank that saw it reports; the others only take part in the
///          collectives until they are stopped.
/// Throws   Error naming the step, the loss, and the first parameter or tensor that is not finite.
[[noreturn]] void explain_non_finite(const NonFiniteLoss& loss, const model::Decoder& decoder,
                                     const MicroBatch& batch, const model::ForwardOptions& options,
                                     const parallel::Groups& groups);

}  // namespace collegium::train
