// SPDX-License-Identifier: Apache-2.0
#pragma once

// Sums gradients over ranks. The loss is divided by the targets of the whole optimizer step before the
// backward pass, so sums are exact: dense gradients over dp; an expert's, which after the backward exchange
// holds the tokens of all its ep peers already, over edp.

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "collegium/parallel/groups.h"

namespace collegium::parallel {

/// One trained parameter. The sums of all dense (expert) parameters lie one after the other in one tensor.
struct GradientSlot {
  at::Tensor leaf;  ///< autograd's; its gradient is moved into `sum`
  at::Tensor sum;   ///< fp32 (fp64 for fp64): a view of `dense` or `experts`
  bool expert = false;
};

class GradientSync {
 public:
  /// `slots` in the parameters' order. With options.overlap_gradients hooks are put on the leaves; they stop
  /// working when this object ends.
  GradientSync(const Groups& groups, const ParallelOptions& options, std::vector<GradientSlot> slots,
               at::Tensor dense, at::Tensor experts);
  ~GradientSync();
  GradientSync(const GradientSync&) = delete;
  GradientSync& operator=(const GradientSync&) = delete;

  /// Call before the backward pass of an optimizer step's last micro-step: from here on complete buckets are
  /// summed while the pass goes on. Does nothing without options.overlap_gradients.
  void begin_last_backward();

  /// What     After the last backward pass, when the leaves' remaining gradients were added to the sums: sums
  ///          over ranks what is not under way, and waits.
  /// Comm     all_reduce of 4 bytes (fp64: 8) per dense parameter over dp and per held expert parameter over
  ///          edp, phase "gradients".
  /// Order    Buckets hold the parameters from the last to the first; dense ones start in that order on every
  ///          rank, experts' on every rank of edp.
  void finish(std::int64_t step);

 private:
  struct Bucket;
  class Hook;

  void add_gradient(std::size_t slot);
  void on_gradient(std::size_t slot);
  void start(Bucket& bucket);

  std::shared_ptr<comm::Communicator> dp_;
  std::shared_ptr<comm::Communicator> edp_;
  bool overlap_ = false;
  std::vector<GradientSlot> slots_;
  at::Tensor dense_;
  at::Tensor experts_;
  // Of dense parameters and of experts, each kind by itself: ranks that hold other experts cut these
  // otherwise, which must not change when a dense bucket starts.
  std::array<std::vector<Bucket>, 2> buckets_;
  std::array<std::size_t, 2> next_bucket_ = {0, 0};
  std::vector<std::size_t> bucket_of_;
  bool armed_ = false;
  std::shared_ptr<GradientSync*> self_;  ///< what the hooks hold: null once this object is gone
};

}  // namespace collegium::parallel
