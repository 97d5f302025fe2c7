// SPDX-License-Identifier: Apache-2.0
#include "collegium/model/checkpoint_io.h"

#include <ATen/ATen.h>
#include <fmt/ranges.h>

#include <map>
#include <set>

#include "collegium/base/error.h"
#include "collegium/model/tensor_io.h"

namespace collegium::model {

namespace {

namespace fs = std::filesystem;

// All safetensors files of a directory, and which holds what.
struct WeightFiles {
  std::vector<SafetensorsFile> files;
  std::map<std::string, std::size_t> file_of;
};

std::set<std::string> shard_names(const fs::path& index_file) {
  std::set<std::string> shards;
  try {
    const Json index = Json::parse(read_file(index_file));
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
  const fs::path index_file = directory / "model.safetensors.index.json";
  if (fs::exists(index_file)) {
    names = shard_names(index_file);
    for (const std::string& name : names) {
      require_config(fs::exists(directory / name), "{}: names the shard {}, which is missing",
                     index_file.string(), name);
    }
  } else {
    require_config(fs::exists(directory / "model.safetensors"),
                   "{}: holds neither model.safetensors nor model.safetensors.index.json",
                   directory.string());
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

void check_finite(const at::Tensor& tensor, const std::string& where) {
  if (!tensor.is_floating_point() || at::isfinite(tensor).all().item<bool>()) return;
  const auto index = at::nonzero(at::isfinite(tensor).logical_not())[0];
  const std::vector<std::int64_t> position(index.const_data_ptr<std::int64_t>(),
                                           index.const_data_ptr<std::int64_t>() + index.numel());
  throw ConfigError(fmt::format("{}: not finite at [{}]", where, fmt::join(position, ", ")));
}

// Takes tensors out of the files one by one, so that what nobody asked for can be named at the end.
class Loader {
 public:
  explicit Loader(const fs::path& directory) : directory_(directory), weights_(open_weights(directory)) {
    for (const auto& [name, file] : weights_.file_of) unused_.insert(name);
  }

  bool has(const std::string& name) const { return weights_.file_of.contains(name); }

  void copy(const std::string& name, const std::vector<std::int64_t>& shape, at::Tensor target) {
    const auto found = weights_.file_of.find(name);
    require_config(found != weights_.file_of.end(), "{}: tensor '{}' is missing", directory_.string(), name);
    const SafetensorsFile& file = weights_.files[found->second];
    const std::string where = fmt::format("{}: tensor '{}'", file.path().string(), name);
    const TensorInfo& info = file.tensors().at(name);
    require_config(info.shape == shape, "{}: has shape [{}], the configuration needs [{}]", where,
                   fmt::join(info.shape, ", "), fmt::join(shape, ", "));
    const at::Tensor value = read_tensor(file, name);
    require_config(value.is_floating_point(), "{}: has dtype {}, needs floating point", where, info.dtype);
    check_finite(value, where);
    target.copy_(value);
    unused_.erase(name);
  }

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

}  // namespace

std::vector<Parameter> load_parameters(const fs::path& directory, const ModelConfig& config,
                                       at::ScalarType dtype) {
  Loader loader(directory);
  std::vector<Parameter> parameters = list_parameters(config);
  const auto buffer_dtype = dtype == at::kDouble ? at::kDouble : at::kFloat;
  for (Parameter& parameter : parameters) {
    parameter.value =
        at::empty(parameter.shape, parameter.kind == ParameterKind::kBuffer ? buffer_dtype : dtype);
  }
  std::set<std::size_t> fused;
  for (std::size_t i = 0; i < parameters.size(); ++i) {
    if (parameters[i].kind != ParameterKind::kExpert || !loader.has(fused_name(parameters[i]))) continue;
    loader.copy(fused_name(parameters[i]), parameters[i].shape, parameters[i].value);
    fused.insert(i);
  }
  for (const DiskTensor& disk : list_disk_tensors(config, parameters)) {
    if (!fused.contains(disk.parameter))
      loader.copy(disk.name, disk.shape, disk_view(disk, parameters[disk.parameter].value));
  }
  if (config.tie_embeddings) loader.accept_copy("lm_head.weight", parameters[0].value);
  loader.refuse_unused();
  return parameters;
}

void save_model(const fs::path& directory, const ModelConfig& config,
                const std::vector<Parameter>& parameters,
                const std::function<at::Tensor(const Parameter&)>& value_of, std::int64_t max_shard_bytes) {
  using Shard = std::vector<std::pair<std::string, at::Tensor>>;
  std::vector<Shard> shards(1);
  std::int64_t shard_bytes = 0;
  std::int64_t total_bytes = 0;
  for (const DiskTensor& disk : list_disk_tensors(config, parameters)) {
    const at::Tensor view = disk_view(disk, value_of(parameters[disk.parameter]));
    const auto bytes = static_cast<std::int64_t>(view.nbytes());
    if (shard_bytes > 0 && shard_bytes + bytes > max_shard_bytes) {
      shards.emplace_back();
      shard_bytes = 0;
    }
    shards.back().emplace_back(disk.name, view);
    shard_bytes += bytes;
    total_bytes += bytes;
  }
  fs::create_directories(directory);
  Json weight_map = Json::object();
  for (std::size_t i = 0; i < shards.size(); ++i) {
    const std::string name = shards.size() == 1
                                 ? "model.safetensors"
                                 : fmt::format("model-{:05}-of-{:05}.safetensors", i + 1, shards.size());
    write_tensors(directory / name, shards[i]);
    for (const auto& [tensor, value] : shards[i]) weight_map[tensor] = name;
  }
  if (shards.size() > 1) {
    const Json index = {{"metadata", {{"total_size", total_bytes}}}, {"weight_map", weight_map}};
    write_file_atomically(directory / "model.safetensors.index.json", index.dump(2));
  }
  const at::ScalarType dtype = value_of(parameters[0]).scalar_type();
  write_file_atomically(directory / "config.json", write_model_config(config, dtype_name(dtype)).dump(2));
}

}  // namespace collegium::model
