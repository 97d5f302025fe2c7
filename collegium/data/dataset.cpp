// SPDX-License-Identifier: Apache-2.0
#include "collegium/data/dataset.h"

#include <algorithm>
#include <cstring>

#include "collegium/base/error.h"

namespace collegium::data {

namespace {

constexpr std::int64_t kVersion = 1;

void check_file(const std::filesystem::path& path, const MappedFile& file, std::int64_t expected_bytes,
                const std::string& expected_checksum) {
  const auto size = static_cast<std::int64_t>(file.bytes().size());
  require_config(size == expected_bytes, "{}: has {} bytes, dataset.json says {}", path.string(), size,
                 expected_bytes);
  const std::string sum = checksum(file.bytes());
  require_config(sum == expected_checksum,
                 "{}: checksum {} does not match dataset.json's {}: the file was changed or is damaged",
                 path.string(), sum, expected_checksum);
}

void check_documents(const DatasetIndex& index, const std::string& file) {
  std::int64_t position = 0;
  for (const Document& document : index.documents) {
    require_config(
        document.begin == position && document.end >= document.begin && document.end <= index.num_tokens,
        "{}: document '{}' spans tokens [{}, {}), expected it to begin at {}", file, document.name,
        document.begin, document.end, position);
    require_config(document.domain >= 0 && document.domain < static_cast<std::int64_t>(index.domains.size()),
                   "{}: document '{}' has domain {}, there are {}", file, document.name, document.domain,
                   index.domains.size());
    position = document.end;
  }
  require_config(position == index.num_tokens, "{}: the documents end at token {}, num_tokens is {}", file,
                 position, index.num_tokens);
}

void check_token_ids(const MappedFile& tokens, std::int64_t vocab_size, const std::filesystem::path& folder) {
  const auto bytes = tokens.bytes();
  std::uint32_t largest = 0;
  for (std::size_t offset = 0; offset < bytes.size(); offset += sizeof(largest)) {
    std::uint32_t id = 0;
    std::memcpy(&id, bytes.data() + offset, sizeof(id));
    largest = std::max(largest, id);
  }
  require_config(bytes.empty() || std::int64_t{largest} < vocab_size,
                 "{}: tokens.bin holds token {}, but dataset.json says vocab_size = {}", folder.string(),
                 largest, vocab_size);
}

}  // namespace

Dataset::Dataset(const std::filesystem::path& folder) : folder_(folder) {
  const auto index_file = folder / "dataset.json";
  require_config(path_exists(index_file),
                 "{}: no prepared data here (dataset.json is missing); make it with 'collegium prepare'",
                 folder.string());
  read_fields(read_json_file(index_file), index_file.string(), index_);
  require_config(index_.version == kVersion, "{}: version = {}: this program reads version {}",
                 index_file.string(), index_.version, kVersion);
  check_documents(index_, index_file.string());
  tokens_ = MappedFile(folder / "tokens.bin");
  check_file(folder / "tokens.bin", tokens_, index_.num_tokens * std::int64_t{sizeof(std::uint32_t)},
             index_.tokens_checksum);
  check_token_ids(tokens_, index_.vocab_size, folder);
  if (index_.has_loss_mask) {
    loss_mask_ = MappedFile(folder / "loss_mask.bin");
    check_file(folder / "loss_mask.bin", loss_mask_, index_.num_tokens, index_.loss_mask_checksum);
  }
  if (has_tokenizer()) {
    const std::string sum = checksum_file(tokenizer_file());
    require_config(
        sum == index_.tokenizer_checksum,
        "{}: checksum {} does not match dataset.json's {}: not the tokenizer that made these tokens",
        tokenizer_file().string(), sum, index_.tokenizer_checksum);
  }
}

std::int64_t Dataset::num_tokens(Split split) const {
  std::int64_t total = 0;
  for (const Document& document : index_.documents) {
    if (document.split == split) total += document.end - document.begin;
  }
  return total;
}

std::int64_t Dataset::token(std::int64_t position) const {
  std::uint32_t id = 0;
  std::memcpy(&id, tokens_.bytes().data() + static_cast<std::size_t>(position) * sizeof(id), sizeof(id));
  return id;
}

void require_same_tokenizer(const Dataset& dataset, const std::filesystem::path& model_folder,
                            const std::string& way_out) {
  if (!dataset.has_tokenizer()) return;
  const auto model_file = model_folder / "tokenizer.model";
  if (path_exists(model_file)) {
    const std::string sum = checksum_file(model_file);
    require_config(
        sum == dataset.index().tokenizer_checksum,
        "{}: the model's tokenizer.model (checksum {}) did not make the tokens of {} (checksum {}); "
        "prepare the data with --tokenizer {}, or pass {}",
        model_folder.string(), sum, dataset.folder().string(), dataset.index().tokenizer_checksum,
        model_file.string(), way_out);
    return;
  }
  require_config(!path_exists(model_folder / "tokenizer.json"),
                 "{}: the model's tokenizer.json is not the SentencePiece model that made the tokens of {}; "
                 "prepare the data from token ids (--tokens), or pass {}",
                 model_folder.string(), dataset.folder().string(), way_out);
}

bool Dataset::is_target(std::int64_t position) const {
  return !index_.has_loss_mask || loss_mask_.bytes()[static_cast<std::size_t>(position)] != std::byte{0};
}

}  // namespace collegium::data
