// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>

namespace collegium::model {

/// What     block(x), keeping only x for the backward pass, which runs the block again [Chen2016] arXiv
///          1604.06174. Gradients are bit-identical to those without recomputation when the block is
///          deterministic.
/// Shape    x must require grad (the gradients of the block's parameters hang on it); they accumulate into
///          their leaves.
at::Tensor recompute(const std::function<at::Tensor(const at::Tensor&)>& block, const at::Tensor& x);

}  // namespace collegium::model
