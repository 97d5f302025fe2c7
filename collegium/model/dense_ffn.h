// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

namespace collegium::model {

/// What     down (silu(gate x) * up x): the feed-forward network of a layer without experts, with autograd.
/// Shape    x_TD [T, D], gate_up_GD [2F, D], down_DF [D, F] -> [T, D].
at::Tensor dense_ffn(const at::Tensor& x_TD, const at::Tensor& gate_up_GD, const at::Tensor& down_DF);

}  // namespace collegium::model
