// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace collegium::model {

/// cos and sin of position times frequency, [S, A/2] for the positions of one forward pass.
struct RotaryTables {
  at::Tensor cos;
  at::Tensor sin;
};

/// What     Tables for positions first .. first + count - 1.
/// Math     angle[s, i] = s theta^(-2 i / A), i < A/2
/// Dtype    evaluated in double, returned in fp32, or in float64 for a model whose `options` say so; on their
///          device.
RotaryTables rotary_tables(std::int64_t first, std::int64_t count, std::int64_t head_dim, double theta,
                           const at::TensorOptions& options);

/// What     Rotates the pairs (i, i + A/2) of every head by the angle of its position, with autograd.
/// Shape    x_BSHA [B, S, H, A], tables of S positions -> [B, S, H, A]
/// Dtype    compute dtype in and out; computed in fp32 (float64 for float64), the tables included.
/// Ref      [Su2021, Eq 34] arXiv 2104.09864, in the half-rotate layout of Hugging Face
at::Tensor apply_rotary(const at::Tensor& x_BSHA, const RotaryTables& tables);

/// The same as a chain of ATen operations: the oracle, and what devices other than the CPU run.
at::Tensor apply_rotary_aten(const at::Tensor& x_BSHA, const RotaryTables& tables);

}  // namespace collegium::model
