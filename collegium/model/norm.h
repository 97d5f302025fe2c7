// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

namespace collegium::model {

/// What     y = round(x / sqrt(mean(x^2) + eps)) * weight, over the last dim, with autograd.
/// Shape    x [..., D], weight [D] -> [..., D].
/// Dtype    statistics and quotient in fp32 (fp64 for fp64), rounded to x's dtype *before* the product with
///          the weight, as Hugging Face's Llama-like models do.
/// Order    Deterministic: the weight's gradient is summed over fixed blocks of rows.
/// Ref      [Zhang2019, Eq 4] arXiv 1910.07467
at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps);

/// The same as a chain of ATen operations: the oracle, and what devices other than the CPU run.
at::Tensor rms_norm_aten(const at::Tensor& x, const at::Tensor& weight, double eps);

}  // namespace collegium::model
