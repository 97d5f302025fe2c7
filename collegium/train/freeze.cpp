// SPDX-License-Identifier: Apache-2.0
#include "collegium/train/freeze.h"

#include <algorithm>

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
  std::vector<model::Parameter> parameters = model::list_parameters(config);
  const auto disk_tensors = model::list_disk_tensors(config, parameters);
  for (const std::string& pattern : patterns) {
    std::vector<std::int64_t> matched(parameters.size(), 0);
    std::vector<std::int64_t> all(parameters.size(), 0);
    for (const model::DiskTensor& disk : disk_tensors) {
      ++all[disk.parameter];
      if (matches(pattern, disk.name)) ++matched[disk.parameter];
    }
    bool any = false;
    for (std::size_t i = 0; i < parameters.size(); ++i) {
      if (matched[i] == 0) continue;
      require_config(matched[i] == all[i],
                     "model.freeze \"{}\": matches {} of the {} tensors of {}, which are trained together",
                     pattern, matched[i], all[i], parameters[i].name);
      parameters[i].trainable = false;
      any = true;
    }
    require_config(any, "model.freeze \"{}\": matches no tensor (names are those on disk, such as {})",
                   pattern, disk_tensors.front().name);
  }
  const bool left =
      std::any_of(parameters.begin(), parameters.end(), [](const auto& p) { return p.trainable; });
  require_config(left, "model.freeze: nothing is left to train");
  for (std::size_t i = 0; i < held.size(); ++i) held[i].trainable = parameters[i].trainable;
}

}  // namespace collegium::train
