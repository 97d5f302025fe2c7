// SPDX-License-Identifier: Apache-2.0
#pragma once

// A prepared corpus: a folder with
//   dataset.json      format version, tokenizer checksum, vocabulary size, domains, documents, split,
//   checksums tokens.bin        token ids of all documents, one after another (uint16 or uint32,
//   little-endian), memory-mapped tokenizer.model   the SentencePiece model that made them (absent for token
//   files that came from elsewhere)

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "collegium/base/file.h"

namespace collegium::data {

enum class Split { kTrain, kValidation };

struct Document {
  std::int64_t begin = 0;   ///< first token
  std::int64_t end = 0;     ///< one past the last
  std::int32_t domain = 0;  ///< index into domains
  Split split = Split::kTrain;
};

class Dataset {
 public:
  /// Throws ConfigError naming the file and the rule when anything is missing, truncated or does not match
  /// its checksum.
  explicit Dataset(const std::filesystem::path& folder);

  std::int64_t vocab_size() const;
  const std::vector<std::string>& domains() const;
  const std::vector<Document>& documents() const;
  const std::string& tokenizer_checksum() const;
  std::int64_t num_tokens(Split split) const;
  std::int64_t token(std::int64_t position) const;

 private:
  MappedFile tokens_;
};

/// One training sequence: S + 1 consecutive tokens of a domain's concatenated documents of a split.
struct Window {
  std::vector<std::int64_t> tokens;        ///< S + 1
  std::vector<std::int64_t> document_ids;  ///< S, which document each input token came from
  std::int32_t domain = 0;
};

/// What     The order of windows: a permutation of all windows of a split per epoch.
/// Order    A function of (seed, epoch, sample index) only; resuming at sample n needs nothing but n.
class Sampler {
 public:
  Sampler(const Dataset& dataset, Split split, std::int64_t sequence_length, std::uint64_t seed);

  std::int64_t num_windows() const;  ///< per epoch
  Window window(std::int64_t sample_index) const;

 private:
  const Dataset* dataset_;
};

}  // namespace collegium::data
