// SPDX-License-Identifier: Apache-2.0
#pragma once

// The lines on which a tokenizer is trained.

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "collegium/data/corpus.h"

namespace collegium::data {

/// What     The lines of the corpus' texts, as read_texts() gives them for encoding; empty ones are left out.
///          One above `max_bytes` comes in pieces, cut before a space where it has one, else between two
///          characters. Of more than `max_lines`, every domain gives an equal share (a small one all it has,
///          the others what it leaves), spread evenly over its files.
/// Order    A function of the files' paths and contents. Every file is read twice, to count and to give; one
///          is in memory at a time.
/// Throws   ConfigError naming file and line, from read_texts().
class TrainingLines {
 public:
  TrainingLines(const Corpus& corpus, std::int64_t max_lines, std::size_t max_bytes);

  bool done() const { return position_ == lines_.size(); }
  void next();
  const std::string& value() const { return lines_[position_]; }

 private:
  void read_more();
  void take_lines(const std::filesystem::path& file);

  const Corpus& corpus_;
  std::size_t max_bytes_;
  std::vector<std::int64_t> counts_;  // lines of each domain
  std::vector<std::int64_t> wanted_;  // how many of them are given
  std::size_t domain_ = 0;            // the next file to read
  std::size_t file_ = 0;
  std::int64_t seen_ = 0;           // lines of the domain that were read
  std::vector<std::string> lines_;  // the given ones of the last file read
  std::size_t position_ = 0;
};

}  // namespace collegium::data
