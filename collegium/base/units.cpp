// SPDX-License-Identifier: Apache-2.0
#include "collegium/base/units.h"

#include <fmt/format.h>

#include <array>
#include <cmath>

namespace collegium {

namespace {

constexpr std::int64_t kMinute = 60;
constexpr std::int64_t kHour = 3600;

template <std::size_t N>
std::string scale(double value, double base, const std::array<const char*, N>& suffixes) {
  if (std::abs(value) < base) return fmt::format("{:g} {}", value, suffixes[0]);
  std::size_t index = 0;
  // What two decimals round to the next unit is written in that.
  while (std::round(std::abs(value) * 100.0) / 100.0 >= base && index + 1 < N) {
    value /= base;
    ++index;
  }
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
  const double milliseconds = std::round(seconds * 1000.0);
  if (milliseconds < 1000.0) return fmt::format("{:.0f} ms", milliseconds);
  if (std::round(seconds * 10.0) / 10.0 < kMinute) return fmt::format("{:.1f} s", seconds);
  const std::int64_t whole = std::llround(seconds);
  if (whole < kHour) return fmt::format("{}m {:02}s", whole / kMinute, whole % kMinute);
  const std::int64_t minutes = std::llround(seconds / kMinute);
  return fmt::format("{}h {:02}m", minutes / kMinute, minutes % kMinute);
}

std::string format_percent(double fraction) { return fmt::format("{:.1f} %", fraction * 100.0); }

}  // namespace collegium
