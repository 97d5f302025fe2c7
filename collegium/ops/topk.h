// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace collegium::ops {

/// What     The K best columns of every row in a total order: score descending, then column ascending; NaN
///          is lowest.
/// Shape    scores_TE [T, E], 1 <= k <= E -> ids [T, K].
/// Dtype    float32 or float64 in, int32 out.
/// Order    Deterministic; ties never depend on threads or sizes.
at::Tensor topk_stable(const at::Tensor& scores_TE, std::int64_t k);

/// The same with ATen operators only, for any device.
at::Tensor topk_stable_aten(const at::Tensor& scores_TE, std::int64_t k);

}  // namespace collegium::ops
