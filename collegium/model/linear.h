// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

namespace collegium::model {

/// What     y = x w^T, with gradients; products as in ops/product.h.
/// Shape    x [..., I], w_OI [O, I] -> [..., O].
/// Dtype    of x and w alike.
at::Tensor linear(const at::Tensor& x, const at::Tensor& w_OI);

}  // namespace collegium::model
