// SPDX-License-Identifier: Apache-2.0
#include "collegium/base/error.h"

namespace collegium::internal {

void throw_check_failure(const char* file, int line, const char* condition, const std::string& detail) {
  throw InternalError(fmt::format("{}:{}: check failed: {}: {}", file, line, condition, detail));
}

}  // namespace collegium::internal
