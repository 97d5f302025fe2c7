// SPDX-License-Identifier: Apache-2.0
#include "collegium/base/fields.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <numeric>
#include <set>

#include "collegium/base/file.h"

namespace collegium {

Json parse_json(std::string_view text, const std::string& origin) {
  std::vector<std::set<std::string>> keys;  // of every object that is open
  const auto callback = [&](int depth, Json::parse_event_t event, Json& parsed) {
    // Whoever prints a value goes as deep as it is.
    constexpr int kDeepest = 100;
    require_config(depth <= kDeepest, "{}: values are nested more than {} deep", origin, kDeepest);
    if (event == Json::parse_event_t::object_start) keys.emplace_back();
    if (event == Json::parse_event_t::object_end) keys.pop_back();
    if (event == Json::parse_event_t::key) {
      const auto key = parsed.get<std::string>();
      require_config(keys.back().insert(key).second, "{}: '{}' occurs twice in an object", origin, key);
    }
    return true;
  };
  try {
    return Json::parse(text, callback);
  } catch (const Json::exception& error) {
    throw ConfigError(fmt::format("{}: not valid JSON: {}", origin, error.what()));
  }
}

Json read_json_file(const std::filesystem::path& file) { return parse_json(read_file(file), file.string()); }

namespace {

std::size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<std::size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), std::size_t{0});
  for (std::size_t i = 0; i < a.size(); ++i) {
    std::size_t diagonal = row[0];
    row[0] = i + 1;
    for (std::size_t j = 0; j < b.size(); ++j) {
      const std::size_t substitution = diagonal + (a[i] == b[j] ? 0 : 1);
      diagonal = row[j + 1];
      row[j + 1] = std::min({row[j + 1] + 1, row[j] + 1, substitution});
    }
  }
  return row.back();
}

std::string hint(std::string_view word, std::span<const std::string> known) {
  const auto nearest = nearest_name(word, known);
  if (nearest) return fmt::format("did you mean '{}'?", *nearest);
  return fmt::format("known here: {}", fmt::join(known, ", "));
}

}  // namespace

std::optional<std::string> nearest_name(std::string_view word, std::span<const std::string> candidates) {
  std::optional<std::string> best;
  std::size_t best_distance = std::max<std::size_t>(2, word.size() / 2) + 1;
  for (const std::string& candidate : candidates) {
    // Half a name is as good a hint as a slip of the fingers.
    const bool begins = word.size() >= 3 && candidate.starts_with(word);
    const std::size_t distance = begins ? 1 : edit_distance(word, candidate);
    if (distance < best_distance) {
      best_distance = distance;
      best = candidate;
    }
  }
  return best;
}

namespace internal {

std::string join_path(const std::string& parent, std::string_view name) {
  return parent.empty() ? std::string(name) : fmt::format("{}.{}", parent, name);
}

void throw_wrong_type(const std::string& path, const Json& value, std::string_view expected) {
  constexpr std::size_t kMostShown = 200;
  std::string shown = value.dump();
  if (shown.size() > kMostShown) shown = shown.substr(0, kMostShown) + " ...";
  throw ConfigError(fmt::format("{} = {}: expected {}", path.empty() ? "top level" : path, shown, expected));
}

void throw_unknown_key(const std::string& path, const std::string& key, std::span<const std::string> known) {
  throw ConfigError(fmt::format("unknown key '{}'; {}", join_path(path, key), hint(key, known)));
}

void throw_unknown_enum(const std::string& path, const std::string& value,
                        std::span<const std::string> known) {
  const auto nearest = nearest_name(value, known);
  throw ConfigError(fmt::format("{} = \"{}\": must be one of {}{}", path, value, fmt::join(known, ", "),
                                nearest ? fmt::format(" (did you mean '{}'?)", *nearest) : ""));
}

}  // namespace internal

}  // namespace collegium
