// SPDX-License-Identifier: Apache-2.0
#pragma once

// The experts as two grouped GEMMs around a SwiGLU that carries the router's weight. On the CPU a task takes
// some rows through all of it, so that what lies between the GEMMs is still in the core's cache. Rows are
// grouped by expert: those of expert e are [offset_e, offset_e + counts_e). G = 2F: gate and up side by side.

#include <ATen/core/Tensor.h>

#include <vector>

#include "collegium/ops/row_source.h"
#include "collegium/ops/weight_gradients.h"

namespace collegium::ops {

struct ExpertWeights {
  at::Tensor gate_up_EGD;  ///< [E, 2F, D]
  at::Tensor down_EDF;     ///< [E, D, F]
};

/// What the backward pass needs. Neither the activation nor the experts' outputs are kept.
struct ExpertsKept {
  RowSource x;
  at::Tensor weights_R;
  at::Tensor counts_E;
  at::Tensor gate_up_RG;
};

/// What     y[r] = down_e (w_r silu(gate_e x_r) * up_e x_r) for the expert e of row r.
/// Shape    x [R, D], weights_R [R] or undefined (= 1), counts_E int64 on the CPU, sum = R -> y_RD [R, D];
///          `kept` receives the arguments and gate_up_RG [R, 2F]. The result is written to `y_RD` where that
///          is given, else to memory of its own.
/// Dtype    of the rows and the experts' weights alike; products summed in fp32 (fp64 for fp64).
at::Tensor expert_mlp(const RowSource& x, const at::Tensor& weights_R, const at::Tensor& counts_E,
                      const ExpertWeights& experts, ExpertsKept& kept, at::Tensor y_RD = {});
at::Tensor expert_mlp_aten(const RowSource& x, const at::Tensor& weights_R, const at::Tensor& counts_E,
                           const ExpertWeights& experts, ExpertsKept& kept, at::Tensor y_RD = {});

/// Which gradients the caller wants; the GEMMs of the others are skipped.
struct ExpertNeeds {
  bool rows = true;
  bool gate_up = true;
  bool down = true;
};

/// What the ranks that the rows came from wait for.
struct ExpertRowGradients {
  at::Tensor x_RD;       ///< undefined when not needed
  at::Tensor weights_R;  ///< undefined when the forward pass had none
};

/// Exactly zero for an expert without rows; undefined when not needed.
struct ExpertWeightGradients {
  at::Tensor gate_up_EGD;
  at::Tensor down_EDF;
};

/// When the weights' gradients are computed: after the rows', which can travel meanwhile, or, of small
/// experts, in one task with them, while what both need is in the core's cache. The results are the same.
enum class WeightGradients { kAfterRows, kWithRows };

/// Gradients of expert_mlp() for dLoss/dy = grad [R, D], in two steps: rows(), then weights(), once each.
class ExpertMlpBackward {
 public:
  /// Keeps a reference to `kept`.
  ExpertMlpBackward(const ExpertsKept& kept, ExpertWeights experts, RowSource grad, const ExpertNeeds& needs);

  /// The rows' gradients are written to `x_RD` where that is given, else to memory of their own.
  ExpertRowGradients rows(WeightGradients when, at::Tensor x_RD = {});
  ExpertWeightGradients weights();

 private:
  struct Workspace;

  void rows_on_cpu(WeightGradients when);
  void rows_in_aten();
  void small_expert(const ExpertRows& expert, Workspace& space, std::int64_t worker) const;
  void piece_of_large(const ExpertRows& piece, Workspace& space, std::int64_t worker) const;

  const ExpertsKept& kept_;
  ExpertWeights experts_;
  RowSource grad_;
  ExpertNeeds needs_;
  at::Tensor row_weights_R_;    // the forward pass's, in the dtype of the inner math
  PaddedRows after_;            // of experts whose weights' gradients come after the rows'
  at::Tensor grad_gate_up_ZG_;  // of these rows
  at::Tensor activation_ZF_;    // of these rows, recomputed
  ExpertRowGradients rows_;
  ExpertWeightGradients weights_;
};

}  // namespace collegium::ops
