// SPDX-License-Identifier: Apache-2.0
#include "collegium/model/tensor_io.h"

#include <ATen/ops/empty.h>

#include <cstring>

#include "collegium/base/error.h"

namespace collegium::model {

namespace {

constexpr std::pair<const char*, at::ScalarType> kFileTypes[] = {
    {"F64", at::kDouble}, {"F32", at::kFloat}, {"F16", at::kHalf},  {"BF16", at::kBFloat16},
    {"I64", at::kLong},   {"I32", at::kInt},   {"I16", at::kShort}, {"I8", at::kChar},
    {"U8", at::kByte},    {"BOOL", at::kBool}};
constexpr std::pair<const char*, at::ScalarType> kComputeTypes[] = {
    {"float64", at::kDouble}, {"float32", at::kFloat}, {"bfloat16", at::kBFloat16}};

const TensorInfo& find_tensor(const SafetensorsFile& file, const std::string& name) {
  const auto found = file.tensors().find(name);
  require_config(found != file.tensors().end(), "{}: no tensor '{}'", file.path().string(), name);
  return found->second;
}

at::Tensor copy_of(std::span<const std::byte> bytes, const std::vector<std::int64_t>& shape,
                   at::ScalarType dtype) {
  at::Tensor tensor = at::empty(shape, dtype);
  if (!bytes.empty()) std::memcpy(tensor.mutable_data_ptr(), bytes.data(), bytes.size());
  return tensor;
}

}  // namespace

at::Tensor read_tensor(const SafetensorsFile& file, const std::string& name) {
  const TensorInfo& info = find_tensor(file, name);
  return copy_of(file.bytes(info), info.shape, scalar_type(info.dtype));
}

at::Tensor read_rows(const SafetensorsFile& file, const std::string& name, std::int64_t first,
                     std::int64_t count) {
  const TensorInfo& info = find_tensor(file, name);
  const std::string where = fmt::format("{}: tensor '{}'", file.path().string(), name);
  COLLEGIUM_CHECK(!info.shape.empty() && first >= 0 && count >= 0 && first + count <= info.shape[0],
                  "{}: has no rows [{}, {})", where, first, first + count);
  std::vector<std::int64_t> shape = info.shape;
  shape[0] = count;
  const auto all = file.bytes(info);
  const std::size_t row = info.shape[0] == 0 ? 0 : all.size() / static_cast<std::size_t>(info.shape[0]);
  return copy_of(all.subspan(static_cast<std::size_t>(first) * row, static_cast<std::size_t>(count) * row),
                 shape, scalar_type(info.dtype));
}

void write_tensors(const std::filesystem::path& path,
                   const std::vector<std::pair<std::string, at::Tensor>>& tensors) {
  std::vector<TensorToWrite> list;
  list.reserve(tensors.size());
  for (const auto& [name, tensor] : tensors) {
    list.push_back({.name = name,
                    .dtype = safetensors_dtype(tensor.scalar_type()),
                    .shape = tensor.sizes().vec(),
                    .bytes = [tensor = tensor] {
                      const at::Tensor contiguous = tensor.detach().cpu().contiguous();
                      std::vector<std::byte> bytes(contiguous.nbytes());
                      if (!bytes.empty())
                        std::memcpy(bytes.data(), contiguous.const_data_ptr(), bytes.size());
                      return bytes;
                    }});
  }
  write_safetensors(path, list);
}

std::string safetensors_dtype(at::ScalarType dtype) {
  for (const auto& [name, type] : kFileTypes) {
    if (type == dtype) return name;
  }
  throw ConfigError(fmt::format("safetensors has no dtype for {}", c10::toString(dtype)));
}

at::ScalarType scalar_type(const std::string& safetensors_dtype) {
  for (const auto& [name, type] : kFileTypes) {
    if (name == safetensors_dtype) return type;
  }
  throw ConfigError(fmt::format("unknown dtype '{}'", safetensors_dtype));
}

std::string dtype_name(at::ScalarType dtype) {
  for (const auto& [name, type] : kComputeTypes) {
    if (type == dtype) return name;
  }
  throw InternalError(fmt::format("{} is no compute dtype", c10::toString(dtype)));
}

at::ScalarType parse_dtype(const std::string& name, const std::string& path) {
  for (const auto& [known, type] : kComputeTypes) {
    if (known == name) return type;
  }
  throw ConfigError(fmt::format("{} = \"{}\": must be float64, float32 or bfloat16", path, name));
}

}  // namespace collegium::model
