// SPDX-License-Identifier: Apache-2.0
#include "collegium/model/checkpoint_io.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/nonzero.h>
#include <fmt/ranges.h>

#include <map>
#include <set>

#include "collegium/base/error.h"
#include "collegium/base/file.h"
#include "collegium/model/tensor_io.h"

namespace collegium::model {

namespace {

namespace fs = std::filesystem;

constexpr const char* kIndexFile = "model.safetensors.index.json";

// All safetensors files of a directory, and which holds what.
struct WeightFiles {
  std::vector<SafetensorsFile> files;
  std::map<std::string, std::size_t> file_of;
};

std::set<std::string> shard_names(const fs::path& index_file) {
  std::set<std::string> shards;
  try {
    const Json index = read_json_file(index_file);
    for (const auto& [tensor, shard] : index.at("weight_map").items())
      shards.insert(shard.get<std::string>());
  } catch (const Json::exception& error) {
    throw ConfigError(fmt::format("{}: not a safetensors index: {}", index_file.string(), error.what()));
  }
  return shards;
}

WeightFiles open_weights(const fs::path& directory) {
  WeightFiles weights;
  std::set<std::string> names = {"model.safetensors"};
  const fs::path index_file = directory / kIndexFile;
  const bool whole = path_exists(directory / "model.safetensors");
  if (path_exists(index_file)) {
    names = shard_names(index_file);
    require_config(!whole || names.contains("model.safetensors"),
                   "{}: holds both model.safetensors and {}, which does not name it: remove the one that is "
                   "not the model",
                   directory.string(), kIndexFile);
    for (const std::string& name : names) {
      require_config(path_exists(directory / name), "{}: names the shard {}, which is missing",
                     index_file.string(), name);
    }
  } else {
    require_config(whole, "{}: holds neither model.safetensors nor {}", directory.string(), kIndexFile);
  }
  for (const std::string& name : names) {
    weights.files.emplace_back(directory / name);
    for (const auto& [tensor, info] : weights.files.back().tensors()) {
      require_config(!weights.file_of.contains(tensor), "{}: tensor '{}' is in two shards",
                     directory.string(), tensor);
      weights.file_of[tensor] = weights.files.size() - 1;
    }
  }
  return weights;
}

// `first_row`: which row of the file's tensor the first one here is.
void check_finite(const at::Tensor& tensor, const std::string& where, std::int64_t first_row) {
  if (!tensor.is_floating_point() || at::isfinite(tensor).all().item<bool>()) return;
  // nonzero's rows are not contiguous.
  const auto index = at::nonzero(at::isfinite(tensor).logical_not())[0].contiguous();
  std::vector<std::int64_t> position(index.const_data_ptr<std::int64_t>(),
                                     index.const_data_ptr<std::int64_t>() + index.numel());
  position[0] += first_row;
  throw ConfigError(fmt::format("{}: not finite at [{}]", where, fmt::join(position, ", ")));
}

// Takes tensors out of the files one by one, so that what nobody asked for can be named at the end.
class Loader {
 public:
  explicit Loader(const fs::path& directory) : directory_(directory), weights_(open_weights(directory)) {
    for (const auto& [name, file] : weights_.file_of) unused_.insert(name);
  }

  bool has(const std::string& name) const { return weights_.file_of.contains(name); }

  // The file that holds the tensor, which has this shape.
  const SafetensorsFile& require(const std::string& name, const std::vector<std::int64_t>& shape) const {
    const auto found = weights_.file_of.find(name);
    require_config(found != weights_.file_of.end(), "{}: tensor '{}' is missing", directory_.string(), name);
    const SafetensorsFile& file = weights_.files[found->second];
    const TensorInfo& info = file.tensors().at(name);
    require_config(info.shape == shape, "{}: tensor '{}': has shape [{}], the configuration needs [{}]",
                   file.path().string(), name, fmt::join(info.shape, ", "), fmt::join(shape, ", "));
    return file;
  }

  void copy(const std::string& name, const std::vector<std::int64_t>& shape, const at::Tensor& target) {
    copy_rows(name, shape, 0, shape[0], target);
  }

  // Rows [first, first + count) of a tensor of this shape; the others are not read.
  void copy_rows(const std::string& name, const std::vector<std::int64_t>& shape, std::int64_t first,
                 std::int64_t count, const at::Tensor& target) {
    const SafetensorsFile& file = require(name, shape);
    const std::string where = fmt::format("{}: tensor '{}'", file.path().string(), name);
    const at::Tensor value = read_rows(file, name, first, count);
    require_config(value.is_floating_point(), "{}: has dtype {}, needs floating point", where,
                   file.tensors().at(name).dtype);
    check_finite(value, where, first);
    target.copy_(value);
    unused_.erase(name);
  }

  // A tensor of the model that this rank does not hold.
  void pass_over(const std::string& name) { unused_.erase(name); }

  // A tied output matrix may be stored again; it must then equal the embedding.
  void accept_copy(const std::string& name, const at::Tensor& same) {
    if (!has(name)) return;
    at::Tensor value = at::empty_like(same);
    copy(name, same.sizes().vec(), value);
    require_config(at::equal(value, same), "{}: '{}' differs from the embedding that it is tied to",
                   directory_.string(), name);
  }

  void refuse_unused() const {
    require_config(unused_.empty(), "{}: tensor '{}' is not part of the model ({} extra in all)",
                   directory_.string(), unused_.empty() ? "" : *unused_.begin(), unused_.size());
  }

 private:
  fs::path directory_;
  WeightFiles weights_;
  std::set<std::string> unused_;
};

// transformers 5 keeps experts fused in memory; some tools write them so.
std::string fused_name(const Parameter& parameter) {
  const std::size_t dot = parameter.name.find('.', 7);
  const bool gate_up = parameter.name.ends_with("gate_up");
  return "model." + parameter.name.substr(0, dot) +
         (gate_up ? ".mlp.experts.gate_up_proj" : ".mlp.experts.down_proj");
}

bool is_expert(const Parameter& parameter) { return parameter.kind == ParameterKind::kExpert; }

// Of all experts, also where only some are held.
std::vector<std::int64_t> fused_shape(const Parameter& parameter, const ModelConfig& config) {
  std::vector<std::int64_t> shape = parameter.shape;
  shape[0] = config.moe.num_experts;
  return shape;
}

// A tensor under its family's name, or under that of transformers 5 in memory, where all families are alike.
std::string name_in(const Loader& loader, const std::string& disk_name) {
  constexpr std::string_view kMixtral = ".block_sparse_moe.";
  const std::size_t place = disk_name.find(kMixtral);
  if (place == std::string::npos || loader.has(disk_name)) return disk_name;
  std::string name = disk_name;
  name.replace(place, kMixtral.size(), ".mlp.");
  return loader.has(name) ? name : disk_name;
}

std::string shard_name(std::int64_t number, std::int64_t total) {
  return total == 1 ? "model.safetensors" : fmt::format("model-{:05}-of-{:05}.safetensors", number, total);
}

}  // namespace

std::vector<Parameter> load_parameters(const fs::path& directory, const ModelConfig& config,
                                       at::ScalarType dtype, const ExpertRange& held) {
  Loader loader(directory);
  std::vector<Parameter> parameters = list_parameters(config, held);
  // All shapes before any memory, and what is not an expert first: a configuration of other sizes may ask for
  // more memory than there is, or for more experts than can be listed.
  std::vector<Parameter> others = parameters;
  std::erase_if(others, is_expert);
  for (const DiskTensor& disk : list_disk_tensors(config, others))
    loader.require(name_in(loader, disk.name), disk.shape);
  const std::vector<DiskTensor> disk_tensors = list_disk_tensors(config, parameters);
  std::set<std::size_t> fused;
  for (std::size_t i = 0; i < parameters.size(); ++i) {
    if (is_expert(parameters[i]) && loader.has(fused_name(parameters[i]))) fused.insert(i);
  }
  for (const std::size_t i : fused)
    loader.require(fused_name(parameters[i]), fused_shape(parameters[i], config));
  for (const DiskTensor& disk : disk_tensors) {
    if (!fused.contains(disk.parameter)) loader.require(name_in(loader, disk.name), disk.shape);
  }
  const auto buffer_dtype = dtype == at::kDouble ? at::kDouble : at::kFloat;
  for (Parameter& parameter : parameters) {
    parameter.value =
        at::empty(parameter.shape, parameter.kind == ParameterKind::kBuffer ? buffer_dtype : dtype);
  }
  for (const std::size_t i : fused) {
    const Parameter& parameter = parameters[i];
    loader.copy_rows(fused_name(parameter), fused_shape(parameter, config), parameter.first_expert,
                     parameter.shape[0], parameter.value);
  }
  for (const DiskTensor& disk : disk_tensors) {
    if (!fused.contains(disk.parameter))
      loader.copy(name_in(loader, disk.name), disk.shape, disk_view(disk, parameters[disk.parameter].value));
  }
  for (const DiskTensor& disk : list_disk_tensors(config, list_parameters(config))) {
    const bool elsewhere =
        disk.expert >= 0 && (disk.expert < held.first || disk.expert >= held.end(config.moe.num_experts));
    if (elsewhere && !fused.contains(disk.parameter)) loader.pass_over(name_in(loader, disk.name));
  }
  if (config.tie_embeddings) loader.accept_copy("lm_head.weight", parameters[0].value);
  loader.refuse_unused();
  return parameters;
}

ShardWriter::ShardWriter(const ModelConfig& config, const std::vector<Parameter>& parameters,
                         const std::function<at::Tensor(const Parameter&)>& value_of, const ModelShare& share,
                         std::int64_t max_shard_bytes) {
  std::int64_t shard_bytes = 0;
  for (const DiskTensor& disk : list_disk_tensors(config, parameters)) {
    const Parameter& parameter = parameters[disk.parameter];
    if (!(is_expert(parameter) ? share.experts : share.others)) continue;
    const at::Tensor view = disk_view(disk, value_of(parameter));
    const auto bytes = static_cast<std::int64_t>(view.nbytes());
    if (shards_.empty() || (shard_bytes > 0 && shard_bytes + bytes > max_shard_bytes)) {
      shards_.emplace_back();
      shard_bytes = 0;
    }
    shards_.back().emplace_back(disk.name, view);
    shard_bytes += bytes;
  }
}

WeightIndex ShardWriter::write(const fs::path& directory, std::int64_t first, std::int64_t total) const {
  WeightIndex index;
  for (std::size_t i = 0; i < shards_.size(); ++i) {
    const std::string name = shard_name(first + static_cast<std::int64_t>(i), total);
    write_tensors(directory / name, shards_[i]);
    for (const auto& [tensor, value] : shards_[i]) {
      index.file_of[tensor] = name;
      index.total_bytes += static_cast<std::int64_t>(value.nbytes());
    }
  }
  return index;
}

void WeightIndex::add(const WeightIndex& other) {
  for (const auto& [tensor, file] : other.file_of) {
    const bool is_new = file_of.emplace(tensor, file).second;
    COLLEGIUM_CHECK(is_new, "tensor '{}' is in {} and in {}", tensor, file_of.at(tensor), file);
  }
  total_bytes += other.total_bytes;
}

std::vector<std::string> write_model_description(const fs::path& directory, const ModelConfig& config,
                                                 at::ScalarType dtype, const WeightIndex& index) {
  std::vector<std::string> written = {"config.json"};
  write_file_atomically(directory / "config.json", write_model_config(config, dtype_name(dtype)).dump(2));
  if (index.file_of.begin()->second == shard_name(1, 1)) return written;
  const Json json = {{"metadata", {{"total_size", index.total_bytes}}}, {"weight_map", index.file_of}};
  write_file_atomically(directory / kIndexFile, json.dump(2));
  written.emplace_back(kIndexFile);
  return written;
}

void save_model(const fs::path& directory, const ModelConfig& config,
                const std::vector<Parameter>& parameters,
                const std::function<at::Tensor(const Parameter&)>& value_of, std::int64_t max_shard_bytes) {
  const ShardWriter writer(config, parameters, value_of, {}, max_shard_bytes);
  fs::create_directories(directory);
  const WeightIndex index = writer.write(directory, 1, writer.num_shards());
  write_model_description(directory, config, value_of(parameters[0]).scalar_type(), index);
}

}  // namespace collegium::model
