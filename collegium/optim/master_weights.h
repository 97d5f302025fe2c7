// SPDX-License-Identifier: Apache-2.0
#pragma once

// What the optimizer keeps for every trained parameter.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "collegium/base/error.h"
#include "collegium/model/parameters.h"

namespace collegium::optim {

struct Slot {
  std::string name;
  model::ParameterKind kind = model::ParameterKind::kDense;
  std::int64_t first_expert = 0;  ///< kExpert: global id of the first expert held
  at::Tensor value;               ///< the model's, in the compute dtype
  at::Tensor master;              ///< fp32 (fp64 for a float64 model); the value itself when the dtypes agree
  at::Tensor gradient;            ///< master dtype: the sum over the micro-steps of an optimizer step
  at::Tensor first_moment;        ///< master dtype
  at::Tensor second_moment;       ///< master dtype
  at::Tensor frozen;              ///< bool, contiguous, the value's shape: what stays as it is; or undefined
};

class MasterWeights {
 public:
  /// One slot for every trainable parameter, in their order; frozen ones and buffers have none.
  explicit MasterWeights(const std::vector<model::Parameter>& parameters);

  std::vector<Slot>& slots() { return slots_; }
  const std::vector<Slot>& slots() const { return slots_; }

  /// Adds every leaf's gradient to its accumulator and clears it.
  void accumulate();
  /// Sets the gradients of what is frozen to zero, when they are complete.
  void clear_frozen_gradients();
  /// value = round(master), after the masters were replaced.
  void write_values();

  /// All slots' gradients are views of these: those of experts, and the others.
  const at::Tensor& dense_gradients() const { return dense_gradients_; }
  const at::Tensor& expert_gradients() const { return expert_gradients_; }

 private:
  std::vector<Slot> slots_;
  at::Tensor dense_gradients_;
  at::Tensor expert_gradients_;
};

/// Sums of squares of gradients by kind: dense, expert (those held here), router, norm, embedding.
using GradientSquares = std::map<std::string, double>;
inline constexpr const char* kExpertKind = "expert";

/// A gradient that is not finite.
class NonFiniteGradient : public Error {
 public:
  NonFiniteGradient(const std::string& message, std::size_t index) : Error(message), slot(index) {}
  std::size_t slot;
};

/// What     The slots' sums of squares, in a fixed order in float64.
/// Throws   NonFiniteGradient when a gradient is not finite, naming the parameter (and expert) nearest the
///          output: the backward pass spreads what is not finite from there to all before it.
GradientSquares gradient_squares(const std::vector<Slot>& slots);

/// The global norm and what it is made of.
struct GradientNorm {
  double total = 0.0;
  std::map<std::string, double> by_kind;
};
/// What     Norms from squares that hold every expert of the model once.
GradientNorm gradient_norm(const GradientSquares& squares);

}  // namespace collegium::optim
