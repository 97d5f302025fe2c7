// SPDX-License-Identifier: Apache-2.0
#pragma once

// Memory that the ranks of one machine read and write alike, processes or threads: what one of them has
// computed need not be copied for the others to see it.

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <cstdint>
#include <memory>

#include "collegium/comm/communicator.h"

namespace collegium::comm {

/// One rank's view. The memory goes when the last rank's view has gone.
class SharedMemory {
 public:
  /// What     Memory of `bytes` for the ranks of a group, all zeros. It becomes resident page by page, near
  ///          the rank that writes a page first.
  /// Comm     a broadcast and an all_reduce of a few bytes; waits for the group.
  /// Throws   Error on all ranks when one of them does not get it: no such file can be made, or ranks do not
  ///          see each other's (other users, containers or machines).
  static std::shared_ptr<SharedMemory> create(Communicator& group, std::int64_t bytes);

  ~SharedMemory();
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  /// At another address on each rank. Who reads what another rank wrote must have met it in a call of the
  /// group in between.
  std::byte* data() const { return data_; }
  std::int64_t bytes() const { return bytes_; }

 private:
  SharedMemory(std::byte* data, std::int64_t bytes) : data_(data), bytes_(bytes) {}

  std::byte* data_;
  std::int64_t bytes_;
};

}  // namespace collegium::comm
