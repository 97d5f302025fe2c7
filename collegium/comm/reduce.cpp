// SPDX-License-Identifier: Apache-2.0
#include "collegium/comm/reduce.h"

#include <c10/util/BFloat16.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "collegium/base/error.h"

namespace collegium::comm {

namespace {

// A block of accumulators stays in the first-level cache while all inputs pass over it.
constexpr std::int64_t kBlock = 1024;

template <typename T>
bool is_nan(T value) {
  return value != value;
}

template <typename Accumulator, typename T>
void accumulate(Accumulator* sums, const T* input, std::int64_t count, ReduceOp op) {
  switch (op) {
    case ReduceOp::kSum:
      for (std::int64_t i = 0; i < count; ++i) sums[i] += static_cast<Accumulator>(input[i]);
      break;
    case ReduceOp::kMax:
      for (std::int64_t i = 0; i < count; ++i) {
        const auto value = static_cast<Accumulator>(input[i]);
        sums[i] = value > sums[i] || is_nan(value) ? value : sums[i];
      }
      break;
    case ReduceOp::kMin:
      for (std::int64_t i = 0; i < count; ++i) {
        const auto value = static_cast<Accumulator>(input[i]);
        sums[i] = value < sums[i] || is_nan(value) ? value : sums[i];
      }
      break;
  }
}

template <typename T, typename Accumulator>
void reduce_typed(std::span<const void* const> inputs, std::span<void* const> outputs, std::int64_t count,
                  ReduceOp op) {
  std::array<Accumulator, kBlock> sums;
  std::array<T, kBlock> results;
  for (std::int64_t begin = 0; begin < count; begin += kBlock) {
    const std::int64_t length = std::min(kBlock, count - begin);
    const T* first = static_cast<const T*>(inputs[0]) + begin;
    for (std::int64_t i = 0; i < length; ++i)
      sums[static_cast<std::size_t>(i)] = static_cast<Accumulator>(first[i]);
    for (const void* input : inputs.subspan(1))
      accumulate(sums.data(), static_cast<const T*>(input) + begin, length, op);
    for (std::int64_t i = 0; i < length; ++i)
      results[static_cast<std::size_t>(i)] = static_cast<T>(sums[static_cast<std::size_t>(i)]);
    for (void* output : outputs)
      std::memcpy(static_cast<T*>(output) + begin, results.data(),
                  static_cast<std::size_t>(length) * sizeof(T));
  }
}

}  // namespace

void reduce_elements(std::span<const void* const> inputs, std::span<void* const> outputs, std::int64_t count,
                     at::ScalarType dtype, ReduceOp op) {
  switch (dtype) {
    case at::kDouble:
      return reduce_typed<double, double>(inputs, outputs, count, op);
    case at::kFloat:
      return reduce_typed<float, float>(inputs, outputs, count, op);
    case at::kBFloat16:
      return reduce_typed<c10::BFloat16, float>(inputs, outputs, count, op);
    case at::kLong:
      return reduce_typed<std::int64_t, std::int64_t>(inputs, outputs, count, op);
    default:
      throw InternalError(fmt::format("reduction of dtype {}", c10::toString(dtype)));
  }
}

}  // namespace collegium::comm
