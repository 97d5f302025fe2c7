// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "collegium/data/corpus.h"

namespace collegium::data {

/// What     Text to token ids and back, by a SentencePiece model (`tokenizer.model`).
class Tokenizer {
 public:
  /// Throws ConfigError naming the path: missing or not a SentencePiece model. For a model directory whose
  /// tokenizer is of another kind (tokenizer.json, .tiktoken) the message says so and names the token-file
  /// way in (--input ids.safetensors).
  static Tokenizer load(const std::filesystem::path& model_file_or_directory);

  ~Tokenizer();
  Tokenizer(Tokenizer&&) noexcept;
  Tokenizer& operator=(Tokenizer&&) noexcept;

  std::vector<std::int64_t> encode(std::string_view text, bool add_bos) const;
  std::string decode(const std::vector<std::int64_t>& ids) const;
  std::string piece(std::int64_t id) const;  ///< one token as text, for tables
  std::int64_t vocab_size() const;
  std::int64_t bos_id() const;
  std::int64_t eos_id() const;
  const std::string& checksum() const;

 private:
  struct Impl;
  explicit Tokenizer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

/// What     Trains a byte-fallback BPE of `vocab_size` pieces on the texts of a corpus: on at most 400 000
///          lines, as TrainingLines chooses them.
/// Order    A function of the texts: the file holds no path and no time.
/// Throws   ConfigError when the corpus is too small for the vocabulary, with both numbers; and that of
///          read_texts().
void train_tokenizer(const Corpus& corpus, std::int64_t vocab_size, const std::filesystem::path& model_file);

}  // namespace collegium::data
