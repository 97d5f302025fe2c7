// SPDX-License-Identifier: Apache-2.0
#pragma once

// The experts of this rank, and what their backward pass keeps.

#include <ATen/core/Tensor.h>

#include <utility>

#include "collegium/ops/expert_mlp.h"

namespace collegium::moe {

/// What the backward pass of the experts needs. Neither the activation nor the experts' outputs are kept.
struct ExpertsState {
  at::Tensor rows_RD;
  at::Tensor gate_up_RG;
  at::Tensor weights_R;
  at::Tensor counts_L;
};

/// What     out[r] = down_e (w_r silu(gate_e x_r) * up_e x_r) for the expert e of row r.
/// Shape    rows_RD [R, D] grouped by expert, weights_R [R] (undefined = 1), gate_up_LGD [L, 2F, D], down_LDF
///          [L, D, F], counts_L int64 on the CPU -> [R, D].
at::Tensor experts_forward(const at::Tensor& rows_RD, const at::Tensor& weights_R, const at::Tensor& counts_L,
                           const at::Tensor& gate_up_LGD, const at::Tensor& down_LDF, ExpertsState& state);

/// Which gradients the caller wants; the GEMMs of the others are skipped.
struct ExpertsNeeds {
  bool rows = true;
  bool gate_up = true;
  bool down = true;
};

/// What the ranks that the rows came from wait for.
struct RowGradients {
  at::Tensor rows_RD;    ///< undefined when not needed
  at::Tensor weights_R;  ///< undefined when the forward pass had none
};
struct ExpertWeightGradients {
  at::Tensor gate_up_LGD;
  at::Tensor down_LDF;
};

/// Gradients of experts_forward() for dLoss/dout [R, D], in two steps, so that the rows' gradients can travel
/// while the weights' are computed.
class ExpertsBackward {
 public:
  /// Keeps references to all arguments.
  ExpertsBackward(const ExpertsState& state, at::Tensor grad_RD, const ExpertsNeeds& needs)
      : state_(state), grad_RD_(std::move(grad_RD)), needs_(needs) {}

  /// First.
  RowGradients rows(const at::Tensor& gate_up_LGD, const at::Tensor& down_LDF);
  /// Second. Those not needed stay undefined.
  ExpertWeightGradients weights() const;

 private:
  const ExpertsState& state_;
  at::Tensor grad_RD_;
  ExpertsNeeds needs_;
  ops::ExpertRowGradients inner_;
};

}  // namespace collegium::moe
