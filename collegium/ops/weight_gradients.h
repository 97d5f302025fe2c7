// SPDX-License-Identifier: Apache-2.0
#pragma once

// Gradients of experts' weights: for each expert one product that sums over its rows.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "collegium/ops/expert_tasks.h"

namespace collegium::ops {

/// What     dW_e = sum over e's rows of dy[r] x[r]^T, for the experts named.
/// Shape    grad_RO [R, O], x_RI [R, I] -> grad_EOI [E, O, I]; exactly zero for an expert without rows.
void outer_into(const std::vector<ExpertRows>& experts, const at::Tensor& grad_RO, const at::Tensor& x_RI,
                const at::Tensor& grad_EOI);
void outer_into_aten(const std::vector<ExpertRows>& experts, const at::Tensor& grad_RO,
                     const at::Tensor& x_RI, const at::Tensor& grad_EOI);

/// What     Rows that such a product runs over. In bf16 a GEMM's kernel is generated for its exact sizes,
///          which costs as much as a small GEMM, and rows per expert differ in every step: so they are
///          rounded up, to multiples of 32 up to 1024 rows and of a 32nd of them above, and the missing ones
///          are zeros, which add nothing. `dtype` is product_dtype().
std::int64_t padded_rows(std::int64_t rows, at::ScalarType dtype);

}  // namespace collegium::ops
