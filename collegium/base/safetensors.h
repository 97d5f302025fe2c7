// SPDX-License-Identifier: Apache-2.0
#pragma once

// The safetensors file format: an 8-byte little-endian header length, a JSON header, and the tensors' bytes.

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "collegium/base/file.h"

namespace collegium {

/// A tensor as the header describes it. `dtype` is the format's name: F64, F32, F16, BF16, I64, I32, I16, I8,
/// U8 or BOOL.
struct TensorInfo {
  std::string dtype;
  std::vector<std::int64_t> shape;
  std::size_t begin = 0;  ///< offsets relative to the data section
  std::size_t end = 0;
};

/// What     Bytes of one element. Throws ConfigError for a dtype that is not known.
std::size_t safetensors_element_bytes(const std::string& dtype);

/// What     A memory-mapped file with a verified header.
/// Throws   ConfigError naming file, tensor and rule: truncated, header too long or not JSON, unknown
///          dtype, size that does not match the shape, offsets out of range, overlapping or leaving holes.
class SafetensorsFile {
 public:
  explicit SafetensorsFile(const std::filesystem::path& path);

  const std::filesystem::path& path() const { return path_; }
  const std::map<std::string, TensorInfo>& tensors() const { return tensors_; }
  std::span<const std::byte> bytes(const TensorInfo& info) const;

 private:
  std::filesystem::path path_;
  MappedFile file_;
  std::size_t data_begin_ = 0;
  std::map<std::string, TensorInfo> tensors_;
};

/// A tensor to be written; `bytes` is called once, in order, so that only one need be in memory.
struct TensorToWrite {
  std::string name;
  std::string dtype;
  std::vector<std::int64_t> shape;
  std::function<std::vector<std::byte>()> bytes;
};

/// What     Writes a file atomically, in the given order.
/// Throws   Error naming the path when the disk is full or the folder cannot be written.
void write_safetensors(const std::filesystem::path& path, const std::vector<TensorToWrite>& tensors,
                       const std::map<std::string, std::string>& metadata = {{"format", "pt"}});

}  // namespace collegium
