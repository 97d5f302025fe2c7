// SPDX-License-Identifier: Apache-2.0
#include "collegium/base/log.h"

#include <utility>

namespace collegium {

namespace {

LogSink& sink() {
  static LogSink instance;
  return instance;
}

void emit(LogLevel level, std::string_view message) {
  if (sink()) sink()(level, message);
}

}  // namespace

void set_log_sink(LogSink new_sink) { sink() = std::move(new_sink); }
void log_info(std::string_view message) { emit(LogLevel::kInfo, message); }
void log_warning(std::string_view message) { emit(LogLevel::kWarning, message); }

}  // namespace collegium
