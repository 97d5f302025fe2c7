// SPDX-License-Identifier: Apache-2.0
#pragma once

// What the optimizer keeps for every trained parameter.

#include <ATen/core/Tensor.h>

#include <map>
#include <string>
#include <vector>

#include "collegium/model/parameters.h"

namespace collegium::optim {

struct Slot {
  std::string name;
  model::ParameterKind kind = model::ParameterKind::kDense;
  at::Tensor value;          ///< the model's, in the compute dtype
  at::Tensor master;         ///< fp32 (fp64 for a float64 model); the value itself when the dtypes agree
  at::Tensor gradient;       ///< master dtype: the sum over the micro-steps of an optimizer step
  at::Tensor first_moment;   ///< master dtype
  at::Tensor second_moment;  ///< master dtype
};

class MasterWeights {
 public:
  /// One slot for every trainable parameter, in their order; frozen ones and buffers have none.
  explicit MasterWeights(const std::vector<model::Parameter>& parameters);

  std::vector<Slot>& slots() { return slots_; }
  const std::vector<Slot>& slots() const { return slots_; }

  /// Adds every leaf's gradient to its accumulator and clears it.
  void accumulate();
  /// value = round(master), after the masters were replaced.
  void write_values();

 private:
  std::vector<Slot> slots_;
};

/// The global norm and what it is made of.
struct GradientNorm {
  double total = 0.0;
  std::map<std::string, double> by_kind;  ///< dense, expert, router, norm, embedding
};
/// What     sqrt of the sum of squares over all slots, every expert once, in a fixed order in float64.
/// Throws   Error naming the parameter (and expert) when a gradient is not finite.
GradientNorm gradient_norm(const std::vector<Slot>& slots);

}  // namespace collegium::optim
