// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace collegium::ops {

/// Memory for what a thread needs again and again: the last that this thread gave back, so that it is still
/// in this core's cache. What an allocator gives may come from another's.
class ThreadBuffer {
 public:
  /// Bytes of a buffer; larger ones are freed.
  static constexpr std::int64_t kMostKept = std::int64_t{2} << 20;

  explicit ThreadBuffer(std::int64_t bytes);
  ~ThreadBuffer();
  ThreadBuffer(const ThreadBuffer&) = delete;
  ThreadBuffer& operator=(const ThreadBuffer&) = delete;

  /// Not initialised; begins at a cache line.
  template <typename T>
  T* data() const {
    return static_cast<T*>(memory_.mutable_data_ptr());
  }

 private:
  at::Tensor memory_;
};

}  // namespace collegium::ops
