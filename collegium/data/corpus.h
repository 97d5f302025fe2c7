// SPDX-License-Identifier: Apache-2.0
#pragma once

// Text files of a domain, found below the paths that the user gave.

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

namespace collegium::data {

/// A domain and one file or folder of it; a domain may be named several times.
struct DomainPath {
  std::string domain;
  std::filesystem::path path;
};
/// Throws ConfigError, naming the option that gave the text, when it is not NAME=PATH.
DomainPath parse_domain_path(const std::string& option, const std::string& text);

/// A text of the corpus. `prompt` comes before `text` and is no target of the loss (empty for plain text).
struct SourceText {
  std::string name;
  std::string prompt;
  std::string text;
};

struct Corpus {
  struct Domain {
    std::string name;
    std::vector<std::filesystem::path> files;  ///< sorted
  };
  std::vector<Domain> domains;   ///< in the order in which they were first named
  std::int64_t num_skipped = 0;  ///< empty, binary or not UTF-8
};

/// What     Finds every text file: regular, not empty, valid UTF-8 without NUL bytes; hidden files and
///          folders are left out.
/// Throws   ConfigError: a path that does not exist, is no file or folder or cannot be read; a domain
///          without any text.
Corpus find_texts(const std::vector<DomainPath>& paths);

/// What     The texts of a file: itself, or for .jsonl one per line ({"text": …} or {"prompt": …,
///          "completion": …}).
/// Throws   ConfigError naming file and line.
std::vector<SourceText> read_texts(const std::filesystem::path& file);

/// What     Well-formed UTF-8: shortest forms only, no surrogates, nothing above U+10FFFF.
bool is_valid_utf8(std::string_view text);

}  // namespace collegium::data
