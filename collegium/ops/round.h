// SPDX-License-Identifier: Apache-2.0
#pragma once

// Rounding of fp32 results to bf16 with the instruction of AVX-512-bf16 where the processor has it, instead
// of the bit operations of row_math::narrow().

#include <c10/util/BFloat16.h>

#include <cstdint>

namespace collegium::ops {

/// What     out[i] = values[i] for i < count, to the nearest, ties to even; NaN stays. Subnormal numbers may
///          become zero.
void round_values(const float* values, std::int64_t count, c10::BFloat16* out);

}  // namespace collegium::ops
