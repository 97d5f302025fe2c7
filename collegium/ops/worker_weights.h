// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

namespace collegium::ops {

/// Experts' weights in the dtype that products are computed in: in place where they have it, or where an
/// expert is so large that a copy for every worker would cost more than widening it again. Otherwise every
/// worker holds a copy of the expert it works on, made once for all the rows of it that come in turn.
class WorkerWeights {
 public:
  /// Shape    weights_EXY [E, X, Y].
  explicit WorkerWeights(const at::Tensor& weights_EXY);

  /// Shape    [X, Y]; a copy is valid until the worker asks for another expert.
  at::Tensor of(std::int64_t expert, std::int64_t worker);

 private:
  at::Tensor weights_EXY_;
  at::Tensor copies_;               // [workers, X, Y]
  std::vector<std::int64_t> held_;  // expert, by worker
};

}  // namespace collegium::ops
