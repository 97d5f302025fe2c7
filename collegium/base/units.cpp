// SPDX-License-Identifier: Apache-2.0
#include "collegium/base/units.h"

#include <fmt/format.h>

#include <array>
#include <cmath>

namespace collegium {

namespace {

constexpr double kMinute = 60.0;
constexpr double kHour = 3600.0;

template <std::size_t N>
std::string scale(double value, double base, const std::array<const char*, N>& suffixes) {
  std::size_t index = 0;
  while (std::abs(value) >= base && index + 1 < N) {
    value /= base;
    ++index;
  }
  if (index == 0) return fmt::format("{:g} {}", value, suffixes[0]);
  return fmt::format("{:.2f} {}", value, suffixes[index]);
}

}  // namespace

std::string format_bytes(double bytes) {
  return scale(bytes, 1024.0, std::array{"B", "KiB", "MiB", "GiB", "TiB", "PiB"});
}

std::string format_count(double count) {
  constexpr double kExact = 100000.0;
  if (std::abs(count) < kExact) return fmt::format("{:g}", count);
  return scale(count, 1000.0, std::array{"", "k", "M", "G", "T", "P"});
}

std::string format_duration(double seconds) {
  if (seconds < 1.0) return fmt::format("{:.0f} ms", seconds * 1000.0);
  if (seconds < kMinute) return fmt::format("{:.1f} s", seconds);
  const auto whole = static_cast<long>(std::lround(seconds));
  if (seconds < kHour) return fmt::format("{}m {:02}s", whole / 60, whole % 60);
  return fmt::format("{}h {:02}m", whole / 3600, whole / 60 % 60);
}

std::string format_percent(double fraction) { return fmt::format("{:.1f} %", fraction * 100.0); }

}  // namespace collegium
