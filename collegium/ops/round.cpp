// SPDX-License-Identifier: Apache-2.0
#include "collegium/ops/round.h"

#include <algorithm>
#include <cstring>

#include "collegium/ops/row_math.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace collegium::ops {

namespace {

using Bf16 = c10::BFloat16;

COLLEGIUM_CLONES void round_bits(const float* values, std::int64_t count, Bf16* __restrict__ out) {
  for (std::int64_t i = 0; i < count; ++i) out[i] = row_math::narrow<Bf16>(values[i]);
}

#if defined(__x86_64__)
__attribute__((target("avx512f,avx512bf16"))) void round_with_instruction(const float* values,
                                                                          std::int64_t count, Bf16* out) {
  constexpr std::int64_t kLanes = 16;
  const std::int64_t whole = count / kLanes * kLanes;
  for (std::int64_t i = 0; i < whole; i += kLanes) {
    const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_loadu_ps(values + i));
    std::memcpy(out + i, &rounded, sizeof(rounded));
  }
  if (whole == count) return;
  float last[kLanes] = {};
  std::copy(values + whole, values + count, last);
  const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_loadu_ps(last));
  std::memcpy(out + whole, &rounded, static_cast<std::size_t>(count - whole) * sizeof(Bf16));
}
#endif

}  // namespace

void round_values(const float* values, std::int64_t count, Bf16* out) {
#if defined(__x86_64__)
  static const bool has_instruction = __builtin_cpu_supports("avx512bf16") != 0;
  if (has_instruction) return round_with_instruction(values, count, out);
#endif
  round_bits(values, count, out);
}

}  // namespace collegium::ops
