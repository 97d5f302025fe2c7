// SPDX-License-Identifier: Apache-2.0
#include "collegium/data/training_lines.h"

#include <algorithm>
#include <numeric>
#include <string_view>

#include "collegium/base/error.h"

namespace collegium::data {

namespace fs = std::filesystem;

namespace {

constexpr std::size_t kLongestCharacter = 4;  // bytes of UTF-8

// Where the first piece of a line ends. A word has the spaces before it, so a cut before them cuts no word.
std::size_t piece_end(std::string_view line, std::size_t max_bytes) {
  if (line.size() <= max_bytes) return line.size();
  for (std::size_t end = max_bytes; end > 0; --end) {
    if (line[end] == ' ' && line[end - 1] != ' ') return end;
  }
  std::size_t end = max_bytes;
  while ((static_cast<unsigned char>(line[end]) & 0xC0U) == 0x80U) --end;
  return end;
}

template <typename Use>
void each_line(std::string_view text, std::size_t max_bytes, const Use& use) {
  while (!text.empty()) {
    std::string_view line = text.substr(0, text.find('\n'));
    text.remove_prefix(std::min(text.size(), line.size() + 1));
    while (!line.empty()) {
      const std::size_t end = piece_end(line, max_bytes);
      use(line.substr(0, end));
      line.remove_prefix(end);
    }
  }
}

template <typename Use>
void each_line_of_file(const fs::path& file, std::size_t max_bytes, const Use& use) {
  for (const SourceText& source : read_texts(file)) {
    each_line(source.prompt, max_bytes, use);
    each_line(source.text, max_bytes, use);
  }
}

// How many of its lines each domain gives. From the smallest on, each takes an equal share of what is left.
std::vector<std::int64_t> share_lines(const std::vector<std::int64_t>& counts, std::int64_t max_lines) {
  std::vector<std::size_t> order(counts.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) { return counts[a] < counts[b]; });
  std::vector<std::int64_t> wanted(counts.size());
  std::int64_t left = max_lines;
  for (std::size_t n = 0; n < order.size(); ++n) {
    const std::size_t domain = order[n];
    wanted[domain] = std::min(counts[domain], left / static_cast<std::int64_t>(order.size() - n));
    left -= wanted[domain];
  }
  return wanted;
}

}  // namespace

TrainingLines::TrainingLines(const Corpus& corpus, std::int64_t max_lines, std::size_t max_bytes)
    : corpus_(corpus), max_bytes_(max_bytes) {
  COLLEGIUM_CHECK(max_bytes >= kLongestCharacter, "pieces of {} bytes", max_bytes);
  for (const Corpus::Domain& domain : corpus.domains) {
    std::int64_t& count = counts_.emplace_back(0);
    for (const fs::path& file : domain.files)
      each_line_of_file(file, max_bytes, [&](std::string_view) { ++count; });
  }
  wanted_ = share_lines(counts_, max_lines);
  read_more();
}

void TrainingLines::next() {
  if (++position_ == lines_.size()) read_more();
}

void TrainingLines::read_more() {
  lines_.clear();
  position_ = 0;
  while (lines_.empty() && domain_ < corpus_.domains.size()) {
    const std::vector<fs::path>& files = corpus_.domains[domain_].files;
    if (file_ < files.size()) {
      take_lines(files[file_++]);
    } else {
      ++domain_;
      file_ = 0;
      seen_ = 0;
    }
  }
}

// Line i of n is one of the m given where (i + 1) m / n reaches a whole number that i m / n does not.
void TrainingLines::take_lines(const fs::path& file) {
  const std::int64_t count = std::max<std::int64_t>(counts_[domain_], 1);  // a file may grow meanwhile
  const std::int64_t wanted = wanted_[domain_];
  each_line_of_file(file, max_bytes_, [&](std::string_view line) {
    const std::int64_t before = seen_ * wanted / count;
    ++seen_;
    if (seen_ * wanted / count > before) lines_.emplace_back(line);
  });
}

}  // namespace collegium::data
