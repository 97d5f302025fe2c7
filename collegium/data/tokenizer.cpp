// SPDX-License-Identifier: Apache-2.0
#include "collegium/data/tokenizer.h"

#include <sentencepiece_processor.h>
#include <sentencepiece_trainer.h>

#include <algorithm>

#include "collegium/base/error.h"
#include "collegium/base/file.h"
#include "collegium/data/training_lines.h"

namespace collegium::data {

namespace fs = std::filesystem;

struct Tokenizer::Impl {
  sentencepiece::SentencePieceProcessor processor;
  std::string checksum;
};

namespace {

void refuse_other_kinds(const fs::path& directory) {
  for (const char* name : {"tokenizer.json", "tekken.json", "vocab.json"}) {
    require_config(!path_exists(directory / name),
                   "{}: its tokenizer ({}) is not a SentencePiece model, which is the only kind that reads "
                   "text here; tokenize "
                   "elsewhere and pass token ids: --input ids.safetensors (eval, inspect), --ids (generate), "
                   "--tokens (prepare)",
                   directory.string(), name);
  }
  throw ConfigError(fmt::format(
      "{}: no tokenizer.model here; pass token ids instead: --input ids.safetensors (eval, inspect), "
      "--ids (generate), --tokens (prepare)",
      directory.string()));
}

// SentencePiece's words without the place in its sources and the condition there, and without options of its
// own program: "Internal: src/file.cc(12) [(a) <= (b)] What it says. Do this or that with --option."
std::string reason_of(const std::string& status) {
  const std::size_t place = status.find(".cc(");
  const std::size_t end = place == std::string::npos ? place : status.find("] ", place);
  const std::string reason = end == std::string::npos ? status : status.substr(end + 2);
  return reason.substr(0, reason.find(" or decrease character_coverage"));
}

class LineIterator : public sentencepiece::SentenceIterator {
 public:
  explicit LineIterator(TrainingLines& lines) : lines_(lines) {}
  bool done() const override { return lines_.done(); }
  void Next() override { lines_.next(); }
  const std::string& value() const override { return lines_.value(); }
  sentencepiece::util::Status status() const override { return {}; }

 private:
  TrainingLines& lines_;
};

}  // namespace

Tokenizer::Tokenizer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Tokenizer::~Tokenizer() = default;
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;
Tokenizer& Tokenizer::operator=(Tokenizer&&) noexcept = default;

Tokenizer Tokenizer::load(const fs::path& model_file_or_directory) {
  fs::path file = model_file_or_directory;
  if (is_folder(file)) {
    file /= "tokenizer.model";
    if (!path_exists(file)) refuse_other_kinds(model_file_or_directory);
  }
  auto impl = std::make_unique<Impl>();
  const std::string content = read_file(file);
  const auto status = impl->processor.LoadFromSerializedProto(content);
  require_config(status.ok(), "{}: not a SentencePiece model", file.string());
  impl->checksum = collegium::checksum(std::as_bytes(std::span(content.data(), content.size())));
  return Tokenizer(std::move(impl));
}

std::vector<std::int64_t> Tokenizer::encode(std::string_view text, bool add_bos) const {
  std::vector<int> ids;
  const auto status = impl_->processor.Encode(text, &ids);
  if (!status.ok()) throw Error(fmt::format("tokenizer: {}", status.ToString()));
  std::vector<std::int64_t> result;
  result.reserve(ids.size() + 1);
  if (add_bos && bos_id() >= 0) result.push_back(bos_id());
  result.insert(result.end(), ids.begin(), ids.end());
  return result;
}

std::string Tokenizer::decode(const std::vector<std::int64_t>& ids) const {
  std::vector<int> narrow;
  for (const std::int64_t id : ids) {
    COLLEGIUM_CHECK(id >= 0, "token {}", id);
    // A model may have more rows than its tokenizer has pieces, and sample one of them.
    narrow.push_back(id < vocab_size() ? static_cast<int>(id) : impl_->processor.unk_id());
  }
  std::string text;
  const auto status = impl_->processor.Decode(narrow, &text);
  if (!status.ok()) throw Error(fmt::format("tokenizer: {}", status.ToString()));
  return text;
}

std::string Tokenizer::piece(std::int64_t id) const {
  return impl_->processor.IdToPiece(static_cast<int>(id));
}
std::int64_t Tokenizer::vocab_size() const { return impl_->processor.GetPieceSize(); }
std::int64_t Tokenizer::bos_id() const { return impl_->processor.bos_id(); }
std::int64_t Tokenizer::eos_id() const { return impl_->processor.eos_id(); }
const std::string& Tokenizer::checksum() const { return impl_->checksum; }

void train_tokenizer(const Corpus& corpus, std::int64_t vocab_size, const fs::path& model_file) {
  constexpr std::int64_t kMaxLines = 400000;
  constexpr std::size_t kMaxLineBytes = 16384;
  const std::unordered_map<std::string, std::string> options = {
      {"model_type", "bpe"},
      {"vocab_size", std::to_string(vocab_size)},
      {"byte_fallback", "true"},
      {"split_digits", "true"},
      {"allow_whitespace_only_pieces", "true"},
      {"remove_extra_whitespaces", "false"},
      {"add_dummy_prefix", "false"},
      {"normalization_rule_name", "identity"},
      {"character_coverage", "0.9995"},
      {"num_threads", "2"},
      {"input_sentence_size", std::to_string(kMaxLines)},
      {"shuffle_input_sentence", "false"},
      {"max_sentence_length", std::to_string(kMaxLineBytes)},
      {"minloglevel", "2"}};
  TrainingLines lines(corpus, kMaxLines, kMaxLineBytes);
  LineIterator iterator(lines);
  std::string model;
  const auto status = sentencepiece::SentencePieceTrainer::Train(options, &iterator, &model);
  std::size_t num_files = 0;
  for (const Corpus::Domain& domain : corpus.domains) num_files += domain.files.size();
  require_config(status.ok(), "cannot train a tokenizer of vocab_size = {} on {} files: {}", vocab_size,
                 num_files, reason_of(status.ToString()));
  write_file_atomically(model_file, model);
}

}  // namespace collegium::data
