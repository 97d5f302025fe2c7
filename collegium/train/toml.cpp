// SPDX-License-Identifier: Apache-2.0
#include "collegium/base/toml.h"

#include "collegium/train/run_config.h"

namespace collegium::train {

Json parse_toml(std::string_view text, const std::string& origin) {
  return collegium::parse_toml(text, origin);
}

}  // namespace collegium::train
