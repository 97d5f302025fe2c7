// SPDX-License-Identifier: Apache-2.0
#include "collegium/base/safetensors.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "collegium/base/error.h"
#include "collegium/base/fields.h"

namespace collegium {

namespace {

constexpr std::size_t kLengthBytes = 8;
constexpr std::uint64_t kMaxHeaderBytes = 100'000'000;  // the format's own limit
constexpr std::size_t kAlignment = 8;

std::size_t checked_bytes(const TensorInfo& info, const std::string& where) {
  __extension__ using Wide = unsigned __int128;
  Wide count = 1;
  for (const std::int64_t size : info.shape) {
    require_config(size >= 0, "{}: shape has the negative size {}", where, size);
    count *= static_cast<Wide>(size);
    require_config(count <= (Wide{1} << 62U), "{}: shape has more than 2^62 elements", where);
  }
  count *= safetensors_element_bytes(info.dtype);
  require_config(count <= std::numeric_limits<std::size_t>::max(), "{}: shape has more than 2^64 bytes",
                 where);
  return static_cast<std::size_t>(count);
}

TensorInfo parse_info(const Json& entry, const std::string& where, std::size_t data_bytes) {
  TensorInfo info;
  std::vector<std::uint64_t> offsets;
  const auto read = [&](const char* key, auto& value) {
    require_config(entry.is_object() && entry.contains(key), "{}: {} is missing", where, key);
    internal::read_value(entry.at(key), fmt::format("{}: {}", where, key), value);
  };
  read("dtype", info.dtype);
  read("shape", info.shape);
  read("data_offsets", offsets);
  require_config(offsets.size() == 2 && offsets[0] <= offsets[1],
                 "{}: data_offsets = [{}]: must be [begin, end]", where, fmt::join(offsets, ", "));
  info.begin = offsets[0];
  info.end = offsets[1];
  require_config(info.end <= data_bytes, "{}: ends at byte {} of the data, which has {} (truncated file?)",
                 where, info.end, data_bytes);
  std::size_t wanted = 0;
  try {
    wanted = checked_bytes(info, where);
  } catch (const ConfigError& error) {
    throw ConfigError(fmt::format("{}: {}", where, error.what()));
  }
  require_config(info.end - info.begin == wanted, "{}: {} x {} needs {} bytes, data_offsets give {}", where,
                 fmt::format("[{}]", fmt::join(info.shape, ", ")), info.dtype, wanted, info.end - info.begin);
  return info;
}

void check_layout(const std::map<std::string, TensorInfo>& tensors, std::size_t data_bytes,
                  const std::string& file) {
  std::vector<std::pair<std::size_t, std::string>> order;
  for (const auto& [name, info] : tensors) {
    if (info.begin != info.end) order.emplace_back(info.begin, name);
  }
  std::sort(order.begin(), order.end());
  std::size_t position = 0;
  for (const auto& [begin, name] : order) {
    require_config(begin == position, "{}: tensor '{}' begins at byte {} of the data, expected {} ({})", file,
                   name, begin, position, begin < position ? "overlap" : "hole");
    position = tensors.at(name).end;
  }
  require_config(position == data_bytes, "{}: the tensors end at byte {} of the data, which has {}", file,
                 position, data_bytes);
}

}  // namespace

std::size_t safetensors_element_bytes(const std::string& dtype) {
  static const std::map<std::string, std::size_t> kBytes = {{"F64", 8}, {"F32", 4}, {"F16", 2}, {"BF16", 2},
                                                            {"I64", 8}, {"I32", 4}, {"I16", 2}, {"I8", 1},
                                                            {"U8", 1},  {"BOOL", 1}};
  const auto found = kBytes.find(dtype);
  require_config(found != kBytes.end(), "unknown dtype '{}'", dtype);
  return found->second;
}

SafetensorsFile::SafetensorsFile(const std::filesystem::path& path) : path_(path), file_(path) {
  const std::string file = path.string();
  const auto bytes = file_.bytes();
  require_config(bytes.size() >= kLengthBytes, "{}: {} bytes are too few for a safetensors file", file,
                 bytes.size());
  std::uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, bytes.data(), kLengthBytes);
  require_config(header_bytes <= kMaxHeaderBytes && header_bytes <= bytes.size() - kLengthBytes,
                 "{}: the header should have {} bytes, the file has {} (truncated, or not safetensors)", file,
                 header_bytes, bytes.size());
  data_begin_ = kLengthBytes + header_bytes;
  const std::size_t data_bytes = bytes.size() - data_begin_;
  const Json header = parse_json({reinterpret_cast<const char*>(bytes.data()) + kLengthBytes, header_bytes},
                                 file + ": the header");
  require_config(header.is_object(), "{}: the header is not a JSON object", file);
  for (const auto& [name, entry] : header.items()) {
    if (name == "__metadata__") continue;
    tensors_[name] = parse_info(entry, fmt::format("{}: tensor '{}'", file, name), data_bytes);
  }
  check_layout(tensors_, data_bytes, file);
}

std::span<const std::byte> SafetensorsFile::bytes(const TensorInfo& info) const {
  return file_.bytes().subspan(data_begin_ + info.begin, info.end - info.begin);
}

void write_safetensors(const std::filesystem::path& path, const std::vector<TensorToWrite>& tensors,
                       const std::map<std::string, std::string>& metadata) {
  Json header = Json::object();
  header["__metadata__"] = metadata;
  std::size_t offset = 0;
  for (const TensorToWrite& tensor : tensors) {
    const std::size_t size =
        checked_bytes({.dtype = tensor.dtype, .shape = tensor.shape, .begin = 0, .end = 0}, tensor.name);
    COLLEGIUM_CHECK(!header.contains(tensor.name), "tensor '{}' written twice", tensor.name);
    header[tensor.name] = {
        {"dtype", tensor.dtype}, {"shape", tensor.shape}, {"data_offsets", {offset, offset + size}}};
    offset += size;
  }
  std::string text = header.dump();
  text.append((kAlignment - text.size() % kAlignment) % kAlignment, ' ');
  const std::uint64_t length = text.size();
  AtomicFile file(path);
  file.write(std::as_bytes(std::span(&length, 1)));
  file.write(text);
  for (const TensorToWrite& tensor : tensors) {
    const std::vector<std::byte> bytes = tensor.bytes();
    const auto& offsets = header[tensor.name]["data_offsets"];
    COLLEGIUM_CHECK(bytes.size() == offsets[1].get<std::size_t>() - offsets[0].get<std::size_t>(),
                    "tensor '{}': {} bytes", tensor.name, bytes.size());
    file.write(bytes);
  }
  file.commit();
}

}  // namespace collegium
