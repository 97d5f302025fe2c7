// SPDX-License-Identifier: Apache-2.0
#pragma once

// Numbers for people: every printed figure has a unit.

#include <cstdint>
#include <string>

namespace collegium {

constexpr double kGiga = 1e9;
constexpr double kGiB = 1073741824.0;  ///< bytes

std::string format_bytes(double bytes);       ///< "1.50 MiB"
std::string format_count(double count);       ///< "12.9 G", "8192"
std::string format_duration(double seconds);  ///< "4m 05s", "1.2 s", "350 ms"
std::string format_percent(double fraction);  ///< 0.125 -> "12.5 %"

}  // namespace collegium
