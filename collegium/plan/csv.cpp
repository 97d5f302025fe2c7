// SPDX-License-Identifier: Apache-2.0
#include <fmt/ranges.h>

#include <algorithm>
#include <charconv>
#include <cmath>

#include "collegium/base/error.h"
#include "collegium/plan/published.h"

namespace collegium::plan {

const std::string& CsvRow::text(const std::string& column) const {
  static const std::string kNothing;
  const auto found = fields.find(column);
  return found == fields.end() ? kNothing : found->second;
}

std::optional<double> CsvRow::number(const std::string& column) const {
  const std::string& field = text(column);
  if (field.empty()) return std::nullopt;
  double value = 0.0;
  const auto [end, error] = std::from_chars(field.data(), field.data() + field.size(), value);
  require_config(error == std::errc() && end == field.data() + field.size() && std::isfinite(value),
                 "{} = {}: must be a number", column, field);
  return value;
}

namespace {

// One record from `at` on; quoted fields may hold commas, quotes (doubled) and line ends.
std::vector<std::string> next_record(const std::string& text, std::size_t& at, int& line) {
  std::vector<std::string> fields(1);
  bool quoted = false;
  for (; at < text.size(); ++at) {
    const char c = text[at];
    if (c == '\n') ++line;
    if (quoted) {
      if (c != '"') {
        fields.back().push_back(c);
      } else if (at + 1 < text.size() && text[at + 1] == '"') {
        fields.back().push_back('"');
        ++at;
      } else {
        quoted = false;
      }
    } else if (c == '"') {
      quoted = true;
    } else if (c == ',') {
      fields.emplace_back();
    } else if (c == '\n') {
      ++at;
      break;
    } else if (c != '\r') {
      fields.back().push_back(c);
    }
  }
  return fields;
}

}  // namespace

std::vector<CsvRow> read_csv(const std::string& text, const std::string& origin) {
  // Spreadsheets begin a file with a byte order mark.
  constexpr std::string_view kMark = "\xEF\xBB\xBF";
  std::size_t at = text.compare(0, kMark.size(), kMark) == 0 ? kMark.size() : 0;
  int line = 1;
  const std::vector<std::string> header = next_record(text, at, line);
  require_config(header.size() > 1, "{}: the first line must name the columns, separated by commas", origin);
  for (std::size_t i = 0; i < header.size(); ++i)
    require_config(std::find(header.begin(), header.begin() + static_cast<std::ptrdiff_t>(i), header[i]) ==
                       header.begin() + static_cast<std::ptrdiff_t>(i),
                   "{}: two columns are named {}", origin, header[i]);
  for (const char* needed : {"metric", "value"})
    require_config(std::find(header.begin(), header.end(), needed) != header.end(),
                   "{}: no column {}; its columns are {}", origin, needed, fmt::join(header, ", "));
  std::vector<CsvRow> rows;
  while (at < text.size()) {
    const int first_line = line;
    const std::vector<std::string> fields = next_record(text, at, line);
    if (fields.size() == 1 && fields.front().empty()) continue;
    CsvRow row;
    row.line = first_line;
    if (fields.size() != header.size()) {
      row.defect = fmt::format("{} fields, but the header has {} columns", fields.size(), header.size());
    } else {
      for (std::size_t i = 0; i < header.size(); ++i) row.fields[header[i]] = fields[i];
    }
    rows.push_back(std::move(row));
  }
  require_config(!rows.empty(), "{}: holds no rows", origin);
  return rows;
}

}  // namespace collegium::plan
