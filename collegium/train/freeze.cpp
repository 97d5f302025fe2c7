// SPDX-License-Identifier: Apache-2.0
#include "collegium/train/freeze.h"

#include <ATen/ops/zeros.h>

#include <set>

#include "collegium/base/error.h"

namespace collegium::train {

bool matches(std::string_view pattern, std::string_view text) {
  if (pattern.empty()) return text.empty();
  if (pattern.front() == '*') {
    return matches(pattern.substr(1), text) || (!text.empty() && matches(pattern, text.substr(1)));
  }
  return !text.empty() && pattern.front() == text.front() && matches(pattern.substr(1), text.substr(1));
}

void freeze_parameters(const model::ModelConfig& config, const std::vector<std::string>& patterns,
                       std::vector<model::Parameter>& held) {
  // Of the whole model, so that every rank says the same of a pattern.
  const std::vector<model::Parameter> parameters = model::list_parameters(config);
  const auto disk_tensors = model::list_disk_tensors(config, parameters);
  std::set<std::string> frozen;
  for (const std::string& pattern : patterns) {
    bool any = false;
    for (const model::DiskTensor& disk : disk_tensors) {
      if (!matches(pattern, disk.name)) continue;
      frozen.insert(disk.name);
      any = true;
    }
    require_config(any, "model.freeze \"{}\": matches no tensor (names are those on disk, such as {})",
                   pattern, disk_tensors.front().name);
  }
  std::vector<bool> trained(parameters.size(), false);
  for (const model::DiskTensor& disk : disk_tensors) {
    if (!frozen.contains(disk.name)) trained[disk.parameter] = true;
  }
  bool left = false;
  for (std::size_t i = 0; i < held.size(); ++i) {
    left = left || (trained[i] && parameters[i].trainable);
    held[i].trainable = held[i].trainable && trained[i];
  }
  require_config(left, "model.freeze: nothing is left to train");
  for (const model::DiskTensor& disk : model::list_disk_tensors(config, held)) {
    model::Parameter& parameter = held[disk.parameter];
    const bool whole = !trained[disk.parameter] && parameter.kind != model::ParameterKind::kBuffer;
    if (whole || !frozen.contains(disk.name)) continue;
    if (!parameter.frozen.defined()) parameter.frozen = at::zeros(parameter.shape, at::kBool);
    model::disk_view(disk, parameter.frozen).fill_(true);
  }
}

}  // namespace collegium::train
