// SPDX-License-Identifier: Apache-2.0
#pragma once

// Libraries do not print. What they want a person to know goes to a sink that the command line installs.

#include <functional>
#include <string>
#include <string_view>

namespace collegium {

enum class LogLevel { kInfo, kWarning };

using LogSink = std::function<void(LogLevel, std::string_view)>;

/// What     Installs where messages go; an empty sink (the default) drops them. Not thread-safe: call at
///          start-up.
void set_log_sink(LogSink sink);
void log_info(std::string_view message);
void log_warning(std::string_view message);

}  // namespace collegium
