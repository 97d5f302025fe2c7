// SPDX-License-Identifier: Apache-2.0
#pragma once

// Random numbers of the router. Each is a function of (seed, purpose, step, layer; global token, expert or
// channel), so it does not depend on how tokens are spread over ranks or micro-steps.

#include <ATen/core/Tensor.h>

#include <string_view>

#include "collegium/moe/routing.h"

namespace collegium::moe {

enum class Distribution { kUniform, kNormal, kGumbel };

/// What     One random number for every token and column.
/// Shape    [T, columns] in `dtype` (fp32 or fp64), on the CPU.
at::Tensor random_values(const TokenContext& context, std::string_view purpose, Distribution distribution,
                         std::int64_t columns, at::ScalarType dtype);

}  // namespace collegium::moe
