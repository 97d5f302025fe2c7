// SPDX-License-Identifier: Apache-2.0
#include "collegium/data/corpus.h"

#include <algorithm>
#include <sstream>

#include "collegium/base/error.h"
#include "collegium/base/fields.h"
#include "collegium/base/file.h"

namespace collegium::data {

namespace fs = std::filesystem;

namespace {

bool is_hidden(const fs::path& path) { return path.filename().string().starts_with('.'); }

void collect(const fs::path& path, std::vector<fs::path>& files) {
  if (is_file(path)) {
    files.push_back(path);
    return;
  }
  require_config(is_folder(path), "--domain: {} is neither a file nor a folder", path.string());
  std::error_code code;
  for (fs::directory_iterator entry(path, code), end; !code && entry != end; entry.increment(code)) {
    if (is_hidden(entry->path())) continue;
    // A link to a folder may lead back to where it stands.
    if (is_folder(entry->path()) && !fs::is_symlink(entry->symlink_status(code))) {
      collect(entry->path(), files);
    } else if (is_file(entry->path())) {
      files.push_back(entry->path());
    }
  }
  require_config(!code, "--domain: cannot read folder {}: {}", path.string(), code.message());
}

bool is_text(const fs::path& file) {
  const MappedFile mapped(file);
  const auto bytes = mapped.bytes();
  const std::string_view text(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  return !text.empty() && text.find('\0') == std::string_view::npos && is_valid_utf8(text);
}

SourceText parse_line(const std::string& line, const std::string& where) {
  try {
    const Json json = Json::parse(line);
    if (json.contains("text"))
      return {.name = where, .prompt = "", .text = json.at("text").get<std::string>()};
    return {.name = where,
            .prompt = json.at("prompt").get<std::string>(),
            .text = json.at("completion").get<std::string>()};
  } catch (const Json::exception&) {
    throw ConfigError(
        fmt::format("{}: needs a JSON object with \"text\", or with \"prompt\" and \"completion\"", where));
  }
}

}  // namespace

DomainPath parse_domain_path(const std::string& option, const std::string& text) {
  const std::size_t equals = text.find('=');
  require_config(equals != std::string::npos && equals > 0 && equals + 1 < text.size(),
                 "{} {}: must be NAME=PATH, such as code=src", option, text);
  return {.domain = text.substr(0, equals), .path = text.substr(equals + 1)};
}

Corpus find_texts(const std::vector<DomainPath>& paths) {
  require_config(!paths.empty(), "no text given: name at least one --domain NAME=PATH");
  Corpus corpus;
  for (const DomainPath& entry : paths) {
    require_config(path_exists(entry.path), "--domain {}={}: no such file or folder", entry.domain,
                   entry.path.string());
    auto domain = std::find_if(corpus.domains.begin(), corpus.domains.end(),
                               [&](const Corpus::Domain& d) { return d.name == entry.domain; });
    if (domain == corpus.domains.end())
      domain = corpus.domains.insert(domain, {.name = entry.domain, .files = {}});
    std::vector<fs::path> found;
    collect(entry.path, found);
    for (const fs::path& file : found) {
      if (is_text(file)) {
        domain->files.push_back(file);
      } else {
        ++corpus.num_skipped;
      }
    }
  }
  for (Corpus::Domain& domain : corpus.domains) {
    require_config(!domain.files.empty(), "domain {}: no UTF-8 text found below its paths", domain.name);
    std::sort(domain.files.begin(), domain.files.end());
    domain.files.erase(std::unique(domain.files.begin(), domain.files.end()), domain.files.end());
  }
  return corpus;
}

std::vector<SourceText> read_texts(const fs::path& file) {
  std::string content = read_file(file);
  if (file.extension() != ".jsonl")
    return {{.name = file.string(), .prompt = "", .text = std::move(content)}};
  std::vector<SourceText> texts;
  std::istringstream lines(content);
  std::string line;
  for (std::int64_t number = 1; std::getline(lines, line); ++number) {
    const bool blank = line.find_first_not_of(" \t\r") == std::string::npos;
    if (!blank) texts.push_back(parse_line(line, fmt::format("{}:{}", file.string(), number)));
  }
  return texts;
}

bool is_valid_utf8(std::string_view text) {
  std::size_t i = 0;
  while (i < text.size()) {
    const auto lead = static_cast<unsigned char>(text[i]);
    std::size_t extra = 0;
    std::uint32_t code = lead;
    std::uint32_t smallest = 0;
    if (lead < 0x80U) {
      ++i;
      continue;
    }
    if (lead >= 0xC2U && lead <= 0xDFU) {
      extra = 1;
      code = lead & 0x1FU;
    } else if ((lead & 0xF0U) == 0xE0U) {
      extra = 2;
      code = lead & 0x0FU;
      smallest = 0x800;
    } else if (lead >= 0xF0U && lead <= 0xF4U) {
      extra = 3;
      code = lead & 0x07U;
      smallest = 0x10000;
    } else {
      return false;
    }
    if (i + extra >= text.size()) return false;
    for (std::size_t k = 1; k <= extra; ++k) {
      const auto byte = static_cast<unsigned char>(text[i + k]);
      if ((byte & 0xC0U) != 0x80U) return false;
      code = (code << 6U) | (byte & 0x3FU);
    }
    if (code < smallest || code > 0x10FFFF || (code >= 0xD800 && code <= 0xDFFF)) return false;
    i += extra + 1;
  }
  return true;
}

}  // namespace collegium::data
