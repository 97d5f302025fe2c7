// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace collegium::model {

/// Rotary tables for consecutive positions: cos and sin of position * theta^(-2 i / A), each twice along the
/// last dim.
struct RotaryTables {
  at::Tensor cos_SA;
  at::Tensor sin_SA;
};

/// What     Tables for positions [first, first + count). Computed in fp32 (fp64 for fp64) and rounded to
/// `dtype`.
RotaryTables rotary_tables(std::int64_t first, std::int64_t count, std::int64_t head_dim, double theta,
                           at::ScalarType dtype);

/// What     x cos + rotate_half(x) sin, where rotate_half pairs dims i and i + A/2.
/// Shape    x_BHSA [B, H, S, A].
/// Ref      [Su2021, Eq 34] arXiv 2104.09864, in the half-rotate layout of Hugging Face
at::Tensor apply_rotary(const at::Tensor& x_BHSA, const RotaryTables& tables);

}  // namespace collegium::model
