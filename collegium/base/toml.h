// SPDX-License-Identifier: Apache-2.0
#pragma once

// TOML files as the JSON that fields.h reads.

#include <string>
#include <string_view>

#include "collegium/base/fields.h"

namespace collegium {

/// What     A TOML text as a JSON object; `origin` names it in messages.
/// Throws   ConfigError with line and column of a syntax error, or for dates and times.
Json parse_toml(std::string_view text, const std::string& origin);

}  // namespace collegium
