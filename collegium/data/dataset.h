// SPDX-License-Identifier: Apache-2.0
#pragma once

// A prepared corpus: a folder with
//   dataset.json      version, vocabulary size, domains, documents with their split, unigram entropy,
//   checksums tokens.bin        token ids of all documents, one after another (uint32, little-endian),
//   memory-mapped loss_mask.bin     one byte per token, 1 = a target of the loss; absent = all are
//   tokenizer.model   the SentencePiece model that made the tokens; absent for tokens that came from
//   elsewhere

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "collegium/base/fields.h"
#include "collegium/base/file.h"

namespace collegium::data {

enum class Split { kTrain, kValidation };

}  // namespace collegium::data

namespace collegium {
template <>
struct EnumNames<data::Split> {
  static constexpr std::pair<std::string_view, data::Split> names[] = {
      {"train", data::Split::kTrain}, {"validation", data::Split::kValidation}};
};
}  // namespace collegium

namespace collegium::data {

/// A contiguous run of tokens from one source file (or a part of one, when a domain has a single file).
struct Document {
  std::string name;
  std::int64_t begin = 0;   ///< first token
  std::int64_t end = 0;     ///< one past the last
  std::int64_t domain = 0;  ///< index into domains
  Split split = Split::kTrain;
};
template <class Fields>
void describe(Fields& fields, Document& d) {
  fields("name", d.name, "path below its domain");
  fields("begin", d.begin, "first token");
  fields("end", d.end, "one past the last token");
  fields("domain", d.domain, "index into domains");
  fields("split", d.split, "train or validation");
}

/// The content of dataset.json.
struct DatasetIndex {
  std::int64_t version = 1;
  std::int64_t vocab_size = 0;
  std::int64_t num_tokens = 0;
  std::vector<std::string> domains;
  std::vector<Document> documents;
  double unigram_entropy = 0.0;
  bool has_loss_mask = false;
  std::string tokens_checksum;
  std::string loss_mask_checksum;
  std::string tokenizer_checksum;
};
template <class Fields>
void describe(Fields& fields, DatasetIndex& d) {
  fields("version", d.version, "of this format");
  fields("vocab_size", d.vocab_size, "token ids are below it");
  fields("num_tokens", d.num_tokens, "of all documents");
  fields("domains", d.domains, "names");
  fields("unigram_entropy", d.unigram_entropy,
         "nats/token of the validation split under the train split's frequencies");
  fields("has_loss_mask", d.has_loss_mask, "loss_mask.bin is there");
  fields("tokens_checksum", d.tokens_checksum, "XXH3 of tokens.bin");
  fields("loss_mask_checksum", d.loss_mask_checksum, "XXH3 of loss_mask.bin");
  fields("tokenizer_checksum", d.tokenizer_checksum, "XXH3 of tokenizer.model, empty without one");
  fields("documents", d.documents, "in token order");
}

class Dataset {
 public:
  /// Throws ConfigError naming the file and the rule when anything is missing, truncated or does not match
  /// its checksum.
  explicit Dataset(const std::filesystem::path& folder);

  const std::filesystem::path& folder() const { return folder_; }
  const DatasetIndex& index() const { return index_; }
  std::int64_t num_tokens(Split split) const;
  bool has_tokenizer() const { return !index_.tokenizer_checksum.empty(); }
  std::filesystem::path tokenizer_file() const { return folder_ / "tokenizer.model"; }
  std::int64_t token(std::int64_t position) const;
  bool is_target(std::int64_t position) const;

 private:
  std::filesystem::path folder_;
  DatasetIndex index_;
  MappedFile tokens_;
  MappedFile loss_mask_;
};

/// What     Compares the tokenizer in a model's folder with the one that made the tokens. Nothing is
///          compared where the tokens came from elsewhere, or the folder has no tokenizer.
/// Throws   ConfigError naming both and `way_out`, the option that skips this check.
void require_same_tokenizer(const Dataset& dataset, const std::filesystem::path& model_folder,
                            const std::string& way_out);

/// One training sequence: S + 1 consecutive tokens of a domain's concatenated documents of a split.
struct Window {
  std::vector<std::int64_t> tokens;        ///< S + 1
  std::vector<std::int64_t> document_ids;  ///< S + 1, which document each token came from
  std::vector<bool> is_target;             ///< S + 1
  std::int64_t domain = 0;
};

/// What     The order of windows: in every epoch a permutation of all windows of a split.
/// Order    A pure function of (seed, epoch, sample index): resuming at sample n needs nothing but n.
class Sampler {
 public:
  /// Throws ConfigError when the split has not enough tokens for one window, with both numbers.
  Sampler(const Dataset& dataset, Split split, std::int64_t sequence_length, std::uint64_t seed);

  std::int64_t num_windows() const { return static_cast<std::int64_t>(starts_.size()); }  ///< per epoch
  bool has_loss_mask() const { return dataset_->index().has_loss_mask; }
  Window window(std::int64_t sample_index) const;
  /// The window at a fixed place, without permutation: how validation walks through its split.
  Window window_in_order(std::int64_t window_index) const;

 private:
  struct Start {
    std::int64_t document = 0;  ///< index of the document the window begins in
    std::int64_t offset = 0;    ///< within that document
  };
  const Dataset* dataset_;
  Split split_;
  std::int64_t sequence_length_;
  std::uint64_t seed_;
  std::vector<Start> starts_;
};

/// What     A bijection of [0, size), different for every key: a four-round Feistel network, walked until
///          it stays inside.
/// Ref      [Black2002, Sec 4] "Ciphers with arbitrary finite domains"
std::int64_t permute_index(std::int64_t index, std::int64_t size, std::uint64_t key);

}  // namespace collegium::data
