// SPDX-License-Identifier: Apache-2.0
#pragma once

// The experts: two grouped GEMMs around a SwiGLU that carries the router's weight.

#include <ATen/core/Tensor.h>

namespace collegium::moe {

/// What the backward pass of the experts needs. The experts' outputs are not kept.
struct ExpertsState {
  at::Tensor rows_RD;
  at::Tensor gate_up_RG;
  at::Tensor activation_RF;
  at::Tensor weights_R;
  at::Tensor counts_L;
};

/// What     out[r] = down_e (w_r silu(gate_e x_r) * up_e x_r) for the expert e of row r.
/// Shape    rows_RD [R, D] grouped by expert, weights_R [R] (undefined = 1), gate_up_LGD [L, 2F, D], down_LDF
/// [L, D, F],
///          counts_L int64 on the CPU -> [R, D].
at::Tensor experts_forward(const at::Tensor& rows_RD, const at::Tensor& weights_R, const at::Tensor& counts_L,
                           const at::Tensor& gate_up_LGD, const at::Tensor& down_LDF, ExpertsState& state);

/// Which gradients the caller wants; the GEMMs of the others are skipped.
struct ExpertsNeeds {
  bool rows = true;
  bool gate_up = true;
  bool down = true;
};
struct ExpertsGradients {
  at::Tensor rows_RD;
  at::Tensor weights_R;
  at::Tensor gate_up_LGD;
  at::Tensor down_LDF;
};
/// What     Gradients of experts_forward() for dLoss/dout [R, D]; those not needed stay undefined.
ExpertsGradients experts_backward(const ExpertsState& state, const at::Tensor& grad_RD,
                                  const at::Tensor& gate_up_LGD, const at::Tensor& down_LDF,
                                  const ExpertsNeeds& needs);

}  // namespace collegium::moe
