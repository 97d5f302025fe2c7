// SPDX-License-Identifier: Apache-2.0
#include <fmt/ranges.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <filesystem>
#include <iterator>

#include "collegium/base/error.h"
#include "collegium/base/file.h"
#include "collegium/plan/published.h"

namespace collegium::plan {

std::string CsvPlace::text() const {
  return file.empty() ? fmt::format("line {}", line) : fmt::format("{} line {}", file, line);
}

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

struct CsvTable {
  std::vector<std::string> header;
  std::vector<CsvRow> rows;
};

// `file` is what rows say they are of, `origin` what messages call it.
CsvTable read_table(const std::string& text, const std::string& file, const std::string& origin) {
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
    row.place = {.file = file, .line = first_line};
    if (fields.size() != header.size()) {
      row.defect = fmt::format("{} fields, but the header has {} columns", fields.size(), header.size());
    } else {
      for (std::size_t i = 0; i < header.size(); ++i) row.fields[header[i]] = fields[i];
    }
    rows.push_back(std::move(row));
  }
  return {.header = header, .rows = std::move(rows)};
}

std::vector<std::filesystem::path> files_below(const std::string& folder) {
  std::vector<std::filesystem::path> files;
  std::error_code code;
  for (std::filesystem::recursive_directory_iterator entry(folder, code), end; !code && entry != end;
       entry.increment(code)) {
    if (entry->path().filename() == "runs.csv") files.push_back(entry->path());
  }
  require_config(!code, "--validate {}: cannot read this folder: {}", folder, code.message());
  require_config(!files.empty(), "--validate {}: no runs.csv below this folder", folder);
  std::sort(files.begin(), files.end());
  return files;
}

}  // namespace

std::vector<CsvRow> read_csv(const std::string& text, const std::string& origin) {
  std::vector<CsvRow> rows = read_table(text, "", origin).rows;
  require_config(!rows.empty(), "{}: holds no rows", origin);
  return rows;
}

std::vector<CsvRow> read_runs(const std::string& path) {
  if (!is_folder(path)) return read_csv(read_file(path), path);
  const std::vector<std::filesystem::path> files = files_below(path);
  CsvTable all;
  for (const std::filesystem::path& file : files) {
    CsvTable one = read_table(read_file(file), file.lexically_relative(path).string(), file.string());
    if (all.header.empty()) all.header = one.header;
    require_config(one.header == all.header, "{}: its columns differ from those of {}", file.string(),
                   files.front().string());
    std::move(one.rows.begin(), one.rows.end(), std::back_inserter(all.rows));
  }
  require_config(!all.rows.empty(), "--validate {}: the runs.csv below this folder hold no rows", path);
  return std::move(all.rows);
}

}  // namespace collegium::plan
