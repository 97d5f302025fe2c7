// SPDX-License-Identifier: Apache-2.0
#include "collegium/ops/thread_buffer.h"

#include <ATen/ops/empty.h>

#include <utility>
#include <vector>

namespace collegium::ops {

namespace {

// Given back last, taken first: a user that takes several in turn gets each of them for the same purpose
// again.
thread_local std::vector<at::Tensor> free_buffers;

}  // namespace

ThreadBuffer::ThreadBuffer(std::int64_t bytes) {
  if (!free_buffers.empty()) {
    memory_ = std::move(free_buffers.back());
    free_buffers.pop_back();
  }
  if (!memory_.defined() || memory_.numel() < bytes) memory_ = at::empty({bytes}, at::kByte);
}

ThreadBuffer::~ThreadBuffer() {
  if (memory_.numel() <= kMostKept) free_buffers.push_back(std::move(memory_));
}

}  // namespace collegium::ops
