// SPDX-License-Identifier: Apache-2.0
#pragma once

// One description of an options struct serves reading, writing, documentation and unknown-key checks.
//
//   struct Adam { double beta1 = 0.9; };
//   template <class Fields> void describe(Fields& fields, Adam& adam) {
//     fields("beta1", adam.beta1, "decay of the first moment, in [0, 1)");
//   }
//
// `describe` is found by argument-dependent lookup. Values may be bool, integers, floating point,
// std::string, DecimalText, enums with EnumNames, std::optional ("auto" = not set) and std::vector of
// those, std::map from string, and nested structs with their own `describe`.

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <filesystem>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "collegium/base/error.h"

namespace collegium {

using Json = nlohmann::ordered_json;

/// Throws ConfigError naming `origin`: the text is not JSON, or an object has a key twice, which parsers of
/// JSON silently merge.
Json parse_json(std::string_view text, const std::string& origin);

/// The same of a file's text. Throws ConfigError naming the file where it cannot be read, too.
Json read_json_file(const std::filesystem::path& file);

/// What     Specialise with `static constexpr std::pair<std::string_view, E> names[]` to let an enum appear
///          in fields.
template <typename E>
struct EnumNames;

template <typename E>
concept NamedEnum = std::is_enum_v<E> && requires { EnumNames<E>::names; };

/// What     The name of an enumerator, as users write it.
template <NamedEnum E>
std::string enum_name(E value) {
  for (const auto& [name, candidate] : EnumNames<E>::names) {
    if (candidate == value) return std::string(name);
  }
  throw InternalError("enumerator without a name");
}

/// What     The candidate nearest to `word` by edit distance, or nothing when none is similar.
std::optional<std::string> nearest_name(std::string_view word, std::span<const std::string> candidates);

/// A decimal number as it was written, for exact arithmetic: users may write 1.25 or "1.25".
struct DecimalText {
  DecimalText() = default;
  DecimalText(std::string value) : text(std::move(value)) {}  // NOLINT(google-explicit-constructor)
  DecimalText(const char* value) : text(value) {}             // NOLINT(google-explicit-constructor)
  std::string text;
};

/// One documented key, as `collegium train --help-config` and docs/ list it.
struct FieldDoc {
  std::string path;
  std::string default_value;
  std::string doc;
};

namespace internal {

[[noreturn]] void throw_wrong_type(const std::string& path, const Json& value, std::string_view expected);
[[noreturn]] void throw_unknown_key(const std::string& path, const std::string& key,
                                    std::span<const std::string> known);
[[noreturn]] void throw_unknown_enum(const std::string& path, const std::string& value,
                                     std::span<const std::string> known);
std::string join_path(const std::string& parent, std::string_view name);

template <typename T>
struct IsVector : std::false_type {};
template <typename T>
struct IsVector<std::vector<T>> : std::true_type {};
template <typename T>
struct IsOptional : std::false_type {};
template <typename T>
struct IsOptional<std::optional<T>> : std::true_type {};
template <typename T>
struct IsMap : std::false_type {};
template <typename T>
struct IsMap<std::map<std::string, T>> : std::true_type {};

class AnyFields {
 public:
  template <typename T>
  void operator()(std::string_view, T&, std::string_view) {}
};

template <typename T>
concept Described = requires(AnyFields& fields, T& value) { describe(fields, value); };

/// How users write an optional value that is not set.
constexpr const char* kNotSet = "auto";

template <typename T>
void read_value(const Json& json, const std::string& path, T& value);
template <typename T>
Json write_value(T& value);

class FieldReader {
 public:
  FieldReader(const Json& object, std::string path) : object_(object), path_(std::move(path)) {
    if (!object.is_object()) throw_wrong_type(path_, object, "a table of keys");
  }
  template <typename T>
  void operator()(std::string_view name, T& value, std::string_view /*doc*/) {
    known_.emplace_back(name);
    const auto found = object_.find(std::string(name));
    if (found != object_.end()) read_value(*found, join_path(path_, name), value);
  }
  void refuse_unknown_keys() const {
    for (const auto& [key, value] : object_.items()) {
      if (std::find(known_.begin(), known_.end(), key) == known_.end()) throw_unknown_key(path_, key, known_);
    }
  }

 private:
  const Json& object_;
  std::string path_;
  std::vector<std::string> known_;
};

class FieldWriter {
 public:
  template <typename T>
  void operator()(std::string_view name, T& value, std::string_view /*doc*/) {
    object[std::string(name)] = write_value(value);
  }
  Json object = Json::object();
};

class FieldDocs {
 public:
  explicit FieldDocs(std::string path, std::vector<FieldDoc>& docs) : path_(std::move(path)), docs_(docs) {}
  template <typename T>
  void operator()(std::string_view name, T& value, std::string_view doc) {
    const std::string path = join_path(path_, name);
    if constexpr (Described<T>) {
      docs_.push_back({path, "", std::string(doc)});
      FieldDocs nested(path, docs_);
      describe(nested, value);
    } else {
      docs_.push_back({path, write_value(value).dump(), std::string(doc)});
    }
  }

 private:
  std::string path_;
  std::vector<FieldDoc>& docs_;
};

template <NamedEnum E>
void read_enum(const Json& json, const std::string& path, E& value, std::vector<std::string> known = {}) {
  if (!json.is_string()) throw_wrong_type(path, json, "a name in quotes");
  const auto text = json.get<std::string>();
  for (const auto& [name, candidate] : EnumNames<E>::names) {
    if (name == text) {
      value = candidate;
      return;
    }
    known.emplace_back(name);
  }
  throw_unknown_enum(path, text, known);
}

template <typename T>
void read_value(const Json& json, const std::string& path, T& value) {
  if constexpr (std::same_as<T, bool>) {
    if (!json.is_boolean()) throw_wrong_type(path, json, "true or false");
    value = json.get<bool>();
  } else if constexpr (std::integral<T>) {
    if (!json.is_number_integer()) throw_wrong_type(path, json, "a whole number");
    if (json.is_number_unsigned() ? !std::in_range<T>(json.get<std::uint64_t>())
                                  : !std::in_range<T>(json.get<std::int64_t>())) {
      throw_wrong_type(path, json,
                       fmt::format("a whole number from {} to {}", std::numeric_limits<T>::min(),
                                   std::numeric_limits<T>::max()));
    }
    value = json.get<T>();
  } else if constexpr (std::floating_point<T>) {
    if (!json.is_number()) throw_wrong_type(path, json, "a number");
    value = json.get<T>();
    require_config(std::isfinite(value), "{} = {}: must be finite", path, value);
  } else if constexpr (std::same_as<T, std::string>) {
    if (!json.is_string()) throw_wrong_type(path, json, "a text in quotes");
    value = json.get<std::string>();
  } else if constexpr (std::same_as<T, DecimalText>) {
    const bool finite = !json.is_number_float() || std::isfinite(json.get<double>());
    if ((!json.is_string() && !json.is_number()) || !finite)
      throw_wrong_type(path, json, "a finite decimal number");
    value = json.is_string() ? json.get<std::string>() : json.dump();
  } else if constexpr (NamedEnum<T>) {
    read_enum(json, path, value);
  } else if constexpr (IsOptional<T>::value) {
    if (json == kNotSet) {
      value.reset();
    } else {
      static_assert(NamedEnum<typename T::value_type>, "a text or number may not be left open");
      read_enum(json, path, value.emplace(), {kNotSet});
    }
  } else if constexpr (IsVector<T>::value) {
    if (!json.is_array()) throw_wrong_type(path, json, "a list");
    value.clear();
    for (std::size_t i = 0; i < json.size(); ++i) {
      typename T::value_type element{};
      read_value(json[i], fmt::format("{}[{}]", path, i), element);
      value.push_back(std::move(element));
    }
  } else if constexpr (IsMap<T>::value) {
    if (!json.is_object()) throw_wrong_type(path, json, "a table of keys");
    value.clear();
    for (const auto& [key, element] : json.items()) read_value(element, join_path(path, key), value[key]);
  } else {
    static_assert(Described<T>, "give the type a describe() function");
    FieldReader reader(json, path);
    describe(reader, value);
    reader.refuse_unknown_keys();
  }
}

template <typename T>
Json write_value(T& value) {
  if constexpr (NamedEnum<T>) {
    return enum_name(value);
  } else if constexpr (std::same_as<T, DecimalText>) {
    return Json(value.text);
  } else if constexpr (IsOptional<T>::value) {
    return value ? write_value(*value) : Json(kNotSet);
  } else if constexpr (IsVector<T>::value) {
    Json list = Json::array();
    for (auto&& element : value) {
      auto copy = static_cast<typename T::value_type>(element);
      list.push_back(write_value(copy));
    }
    return list;
  } else if constexpr (IsMap<T>::value) {
    Json object = Json::object();
    for (auto& [key, element] : value) object[key] = write_value(element);
    return object;
  } else if constexpr (Described<T>) {
    FieldWriter writer;
    describe(writer, value);
    return writer.object;
  } else {
    return Json(value);
  }
}

}  // namespace internal

/// What     Reads every key of `json` into `value`; keys that are absent keep the value's defaults.
/// Throws   ConfigError: a wrong type (path, value, what was expected), an unknown key (with the nearest
///          known one).
template <typename T>
void read_fields(const Json& json, const std::string& path, T& value) {
  internal::read_value(json, path, value);
}

/// What     The struct as JSON, every key present.
template <typename T>
Json write_fields(T value) {
  return internal::write_value(value);
}

/// What     Path, default and documentation of every key.
template <typename T>
std::vector<FieldDoc> document_fields(const std::string& path = "") {
  T value{};
  std::vector<FieldDoc> docs;
  internal::FieldDocs collector(path, docs);
  describe(collector, value);
  return docs;
}

}  // namespace collegium
