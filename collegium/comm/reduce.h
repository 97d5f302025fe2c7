// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>
#include <span>

#include "collegium/comm/call.h"

namespace collegium::comm {

/// What     outputs[o][i] = inputs[0][i] (op) inputs[1][i] (op) ... for i < count, on every output.
/// Math     left to right, element by element: the bits do not depend on how a caller cuts the range.
/// Dtype    float64, float32, int64 in themselves; bfloat16 in float32, rounded once. A NaN wins every
///          maximum and minimum. An output may be one of the inputs (the same address), not a shifted part
///          of one.
void reduce_elements(std::span<const void* const> inputs, std::span<void* const> outputs, std::int64_t count,
                     at::ScalarType dtype, ReduceOp op);

}  // namespace collegium::comm
