// SPDX-License-Identifier: Apache-2.0
#pragma once

// The memory of a contiguous tensor, for backends that move bytes.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <cstring>

namespace collegium::comm {

/// What     Where the values of a contiguous tensor begin.
inline char* bytes_of(const at::Tensor& tensor) { return static_cast<char*>(tensor.data_ptr()); }

/// What     memcpy that may be given no memory where there is nothing to copy.
inline void copy_bytes(char* to, const char* from, std::int64_t bytes) {
  if (bytes > 0) std::memcpy(to, from, static_cast<std::size_t>(bytes));
}

}  // namespace collegium::comm
