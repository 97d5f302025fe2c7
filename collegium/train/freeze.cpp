// SPDX-License-Identifier: Apache-2.0
#include "collegium/train/freeze.h"

#include <ATen/ops/zeros.h>

#include "collegium/base/error.h"

namespace collegium::train {

bool matches(std::string_view pattern, std::string_view text) {
  if (pattern.empty()) return text.empty();
  if (pattern.front() == '*') {
    return matches(pattern.substr(1), text) || (!text.empty() && matches(pattern, text.substr(1)));
  }
  return !text.empty() && pattern.front() == text.front() && matches(pattern.substr(1), text.substr(1));
}

Freezing find_frozen(const model::ModelConfig& config, const std::vector<std::string>& patterns) {
  // Of the whole model, so that every rank says the same of a pattern.
  const std::vector<model::Parameter> parameters = model::list_parameters(config);
  Freezing freezing;
  freezing.trained.assign(parameters.size(), true);
  if (patterns.empty()) return freezing;  // a model may have a million of tensors on disk
  const auto disk_tensors = model::list_disk_tensors(config, parameters);
  for (const std::string& pattern : patterns) {
    bool any = false;
    for (const model::DiskTensor& disk : disk_tensors) {
      if (!matches(pattern, disk.name)) continue;
      freezing.disk_names.insert(disk.name);
      any = true;
    }
    require_config(any, "model.freeze \"{}\": matches no tensor (names are those on disk, such as {})",
                   pattern, disk_tensors.front().name);
  }
  freezing.trained.assign(parameters.size(), false);
  for (const model::DiskTensor& disk : disk_tensors) {
    if (!freezing.disk_names.contains(disk.name)) freezing.trained[disk.parameter] = true;
  }
  bool left = false;
  for (std::size_t i = 0; i < parameters.size(); ++i)
    left = left || (freezing.trained[i] && parameters[i].trainable);
  require_config(left, "model.freeze: nothing is left to train");
  return freezing;
}

void freeze_parameters(const model::ModelConfig& config, const Freezing& freezing,
                       std::vector<model::Parameter>& held) {
  for (std::size_t i = 0; i < held.size(); ++i) held[i].trainable = held[i].trainable && freezing.trained[i];
  for (const model::DiskTensor& disk : model::list_disk_tensors(config, held)) {
    model::Parameter& parameter = held[disk.parameter];
    const bool whole = !freezing.trained[disk.parameter] && parameter.kind != model::ParameterKind::kBuffer;
    if (whole || !freezing.disk_names.contains(disk.name)) continue;
    if (!parameter.frozen.defined()) parameter.frozen = at::zeros(parameter.shape, at::kBool);
    model::disk_view(disk, parameter.frozen).fill_(true);
  }
}

}  // namespace collegium::train
