// SPDX-License-Identifier: Apache-2.0
#pragma once

// What row kernels share: widening and narrowing of elements, sums in a fixed lane order,
// and compilation of a kernel for several instruction sets (chosen when the program is loaded).

#include <c10/util/BFloat16.h>

#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <type_traits>

// Sanitizers are not ready when the loader picks a clone, so their builds have the portable form alone.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__) && \
    !defined(__SANITIZE_THREAD__)
#define COLLEGIUM_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define COLLEGIUM_CLONES
#endif
#define COLLEGIUM_INLINE inline __attribute__((always_inline))

namespace collegium::ops::row_math {

/// The type that a row of T is computed in: fp32 for bf16 and fp32, double for double.
template <typename T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

/// What     A value in the type its sums are kept in.
COLLEGIUM_INLINE double widen(double value) { return value; }
/// What     A value in the type its sums are kept in.
COLLEGIUM_INLINE float widen(float value) { return value; }
/// What     A value in the type its sums are kept in.
COLLEGIUM_INLINE float widen(c10::BFloat16 value) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(value.x) << 16U);
}

/// Round to nearest even; without a branch, so that the loop around it becomes vector code.
template <typename T>
COLLEGIUM_INLINE T narrow(Wide<T> value) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    const auto bits = std::bit_cast<std::uint32_t>(value);
    const std::uint32_t rounded = (bits + 0x7fffU + ((bits >> 16U) & 1U)) >> 16U;
    const std::uint32_t quiet_nan = (bits >> 16U) | 0x40U;
    return c10::BFloat16(static_cast<std::uint16_t>(value == value ? rounded : quiet_nan),
                         c10::BFloat16::from_bits());
  } else {
    return value;
  }
}

/// e^x for x <= 0 in vector code, within 2 units in the last place; 0 below the smallest normal number, NaN
/// stays. Cephes' expf: x = n ln 2 + r with |r| <= ln 2 / 2, a polynomial in r, and n added to the exponent.
COLLEGIUM_INLINE float exp_of_negative(float x) {
  constexpr float kRoundToInteger = 12582912.0F;  // 1.5 * 2^23: adding it leaves round(x) in the low bits
  const float shifted = x * 1.44269504088896341F + kRoundToInteger;
  const float n = shifted - kRoundToInteger;
  const float r = (x - n * 0.693359375F) + n * 2.12194440e-4F;
  float p = 1.9875691500e-4F;
  p = p * r + 1.3981999507e-3F;
  p = p * r + 8.3334519073e-3F;
  p = p * r + 4.1665795894e-2F;
  p = p * r + 1.6666665459e-1F;
  p = p * r + 5.0000001201e-1F;
  p = p * r * r + r + 1.0F;
  const float power = std::bit_cast<float>((std::bit_cast<std::uint32_t>(shifted) << 23U) + 0x3f800000U);
  return x < -87.0F ? 0.0F : p * power;
}
/// What     The same in double precision, which only exactness asks for: the library's.
COLLEGIUM_INLINE double exp_of_negative(double x) { return std::exp(x); }

/// What     1 / (1 + exp(-z)), without overflow for either sign; NaN stays.
template <typename W>
COLLEGIUM_INLINE W sigmoid(W z) {
  const W e = exp_of_negative(z < W{0} ? z : -z);
  return (z < W{0} ? e : W{1}) / (W{1} + e);
}

inline constexpr std::int64_t kLanes = 16;

/// sum_i term(i) for i < count, added lane by lane and then over the lanes: the order is fixed.
template <typename W, typename Term>
COLLEGIUM_INLINE W lane_sum(std::int64_t count, Term term) {
  std::array<W, kLanes> lanes{};
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (std::int64_t lane = 0; lane < kLanes; ++lane)
      lanes[static_cast<std::size_t>(lane)] += term(i + lane);
  }
  W sum{0};
  for (const W lane : lanes) sum += lane;
  for (; i < count; ++i) sum += term(i);
  return sum;
}

/// max_i row[i], lane by lane; NaN is passed over.
template <typename T>
COLLEGIUM_INLINE Wide<T> lane_max(const T* row, std::int64_t count) {
  std::array<Wide<T>, kLanes> lanes{};
  lanes.fill(widen(row[0]));
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (std::int64_t lane = 0; lane < kLanes; ++lane) {
      auto& best = lanes[static_cast<std::size_t>(lane)];
      best = widen(row[i + lane]) > best ? widen(row[i + lane]) : best;
    }
  }
  Wide<T> best = lanes[0];
  for (const Wide<T> lane : lanes) best = lane > best ? lane : best;
  for (; i < count; ++i) best = widen(row[i]) > best ? widen(row[i]) : best;
  return best;
}

}  // namespace collegium::ops::row_math
