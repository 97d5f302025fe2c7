// SPDX-License-Identifier: Apache-2.0
#pragma once

// The files of configs/models and configs/clusters, compiled in: the planner's catalogue.

#include <string_view>
#include <vector>

namespace collegium::plan {

struct EmbeddedFile {
  std::string_view name;  ///< file name without its extension
  std::string_view text;  ///< the file's content
};

/// What     configs/models/*.json: Hugging Face configs of published models.
const std::vector<EmbeddedFile>& embedded_models();
/// What     configs/clusters/*.toml: descriptions of accelerators, nodes and links.
const std::vector<EmbeddedFile>& embedded_clusters();

}  // namespace collegium::plan
