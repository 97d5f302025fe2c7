// SPDX-License-Identifier: Apache-2.0
#include "collegium/base/toml.h"

#include <toml++/toml.h>

#include <sstream>

#include "collegium/base/error.h"

namespace collegium {

namespace {

Json to_json(const toml::node& node, const std::string& path) {
  if (const auto* table = node.as_table()) {
    Json object = Json::object();
    for (const auto& [key, value] : *table)
      object[std::string(key.str())] = to_json(value, path + "." + std::string(key.str()));
    return object;
  }
  if (const auto* array = node.as_array()) {
    Json list = Json::array();
    for (const auto& value : *array) list.push_back(to_json(value, path));
    return list;
  }
  if (const auto* text = node.as_string()) return text->get();
  if (const auto* number = node.as_integer()) return number->get();
  if (const auto* number = node.as_floating_point()) return number->get();
  if (const auto* flag = node.as_boolean()) return flag->get();
  throw ConfigError(path.substr(1) + ": dates and times have no meaning here");
}

}  // namespace

Json parse_toml(std::string_view text, const std::string& origin) {
  try {
    return to_json(toml::parse(text, origin), "");
  } catch (const toml::parse_error& error) {
    const auto& position = error.source().begin;
    throw ConfigError(
        fmt::format("{}:{}:{}: {}", origin, position.line, position.column, error.description()));
  }
}

}  // namespace collegium
