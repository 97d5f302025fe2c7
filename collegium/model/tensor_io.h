// SPDX-License-Identifier: Apache-2.0
#pragma once

// Tensors in safetensors files.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <string>
#include <utility>
#include <vector>

#include "collegium/base/safetensors.h"

namespace collegium::model {

/// What     A copy of a tensor of the file, in the file's dtype.
/// Throws   ConfigError naming file and tensor when it is missing.
at::Tensor read_tensor(const SafetensorsFile& file, const std::string& name);
/// What     Of a tensor with at least one dim only rows [first, first + count); nothing else is read.
at::Tensor read_rows(const SafetensorsFile& file, const std::string& name, std::int64_t first,
                     std::int64_t count);

/// What     Writes tensors in the given order, atomically.
void write_tensors(const std::filesystem::path& path,
                   const std::vector<std::pair<std::string, at::Tensor>>& tensors);

/// "F32", "BF16", ... of a dtype, and back. Throws ConfigError for one that safetensors or ATen does not
/// know.
std::string safetensors_dtype(at::ScalarType dtype);
at::ScalarType scalar_type(const std::string& safetensors_dtype);

/// "float64", "float32", "bfloat16" as users and config.json write them, and back; `path` names the field in
/// errors.
std::string dtype_name(at::ScalarType dtype);
at::ScalarType parse_dtype(const std::string& name, const std::string& path);

}  // namespace collegium::model
