// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "collegium/base/error.h"
#include "collegium/base/rng.h"
#include "collegium/data/dataset.h"

namespace collegium::data {

std::int64_t permute_index(std::int64_t index, std::int64_t size, std::uint64_t key) {
  COLLEGIUM_CHECK(index >= 0 && index < size, "index {} of {}", index, size);
  unsigned half_bits = 1;
  while ((std::int64_t{1} << (2 * half_bits)) < size) ++half_bits;
  const std::uint64_t mask = (std::uint64_t{1} << half_bits) - 1;
  constexpr std::uint64_t kRounds = 4;
  auto value = static_cast<std::uint64_t>(index);
  // The network permutes [0, 4^half_bits), at most four times `size`; walking its cycle stays a bijection of
  // [0, size).
  do {
    for (std::uint64_t round = 0; round < kRounds; ++round) {
      const std::uint64_t left = value >> half_bits;
      const std::uint64_t right = value & mask;
      value = (right << half_bits) | (left ^ (mix(mix(key, round), right) & mask));
    }
  } while (value >= static_cast<std::uint64_t>(size));
  return static_cast<std::int64_t>(value);
}

Sampler::Sampler(const Dataset& dataset, Split split, std::int64_t sequence_length, std::uint64_t seed)
    : dataset_(&dataset), split_(split), sequence_length_(sequence_length), seed_(seed) {
  const DatasetIndex& index = dataset.index();
  const std::int64_t wanted = sequence_length + 1;
  for (std::size_t domain = 0; domain < index.domains.size(); ++domain) {
    std::int64_t next = 0;      // where the next window begins, in the domain's concatenated documents
    std::int64_t position = 0;  // where the current document begins there
    std::vector<Start> starts;
    for (std::size_t i = 0; i < index.documents.size(); ++i) {
      const Document& document = index.documents[i];
      if (document.domain != static_cast<std::int64_t>(domain) || document.split != split) continue;
      const std::int64_t length = document.end - document.begin;
      for (; next < position + length; next += sequence_length) {
        starts.push_back({.document = static_cast<std::int64_t>(i), .offset = next - position});
      }
      position += length;
    }
    // The last windows may lack tokens: a window needs one more than its inputs, for the last target.
    const std::int64_t whole = position < wanted ? 0 : (position - 1) / sequence_length;
    starts.resize(
        static_cast<std::size_t>(std::min<std::int64_t>(whole, static_cast<std::int64_t>(starts.size()))));
    starts_.insert(starts_.end(), starts.begin(), starts.end());
  }
  require_config(!starts_.empty(),
                 "data: no domain of {} has the {} {} tokens that one window of sequence_length = {} needs",
                 dataset.folder().string(), wanted, enum_name(split), sequence_length);
}

Window Sampler::window(std::int64_t sample_index) const {
  const std::int64_t epoch = sample_index / num_windows();
  const std::uint64_t key = mix(mix(seed_, hash_name("data/order")), static_cast<std::uint64_t>(epoch));
  return window_in_order(permute_index(sample_index % num_windows(), num_windows(), key));
}

Window Sampler::window_in_order(std::int64_t window_index) const {
  const Start& start = starts_.at(static_cast<std::size_t>(window_index));
  const auto& documents = dataset_->index().documents;
  Window window;
  auto document = static_cast<std::size_t>(start.document);
  window.domain = documents[document].domain;
  std::int64_t position = documents[document].begin + start.offset;
  const auto wanted = static_cast<std::size_t>(sequence_length_ + 1);
  while (window.tokens.size() < wanted) {
    if (position >= documents[document].end) {
      do {
        ++document;
      } while (documents[document].domain != window.domain || documents[document].split != split_);
      position = documents[document].begin;
      continue;
    }
    window.tokens.push_back(dataset_->token(position));
    window.document_ids.push_back(static_cast<std::int64_t>(document));
    window.is_target.push_back(dataset_->is_target(position));
    ++position;
  }
  return window;
}

}  // namespace collegium::data
