// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace collegium::ops {

/// What     Whether this processor has an instruction set, by ATen's name for it ("avx2", "avx512_f",
///          "avx512_bf16", "amx_bf16"); no other architecture than x86 has these.
bool cpu_has(const char* instruction_set);

}  // namespace collegium::ops
