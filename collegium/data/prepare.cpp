// SPDX-License-Identifier: Apache-2.0
#include "collegium/data/prepare.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <random>
#include <utility>

#include "collegium/base/error.h"
#include "collegium/base/file.h"
#include "collegium/base/rng.h"
#include "collegium/base/safetensors.h"
#include "collegium/base/temporary_folder.h"
#include "collegium/base/units.h"
#include "collegium/data/tokenizer.h"

namespace collegium::data {

namespace fs = std::filesystem;

namespace {

// Everything that will be written, gathered in memory: four bytes a token.
struct Tokens {
  std::vector<std::uint32_t> ids;
  std::vector<std::uint8_t> is_target;
  DatasetIndex index;

  void append(const std::vector<std::int64_t>& tokens, bool target) {
    ids.insert(ids.end(), tokens.begin(), tokens.end());
    is_target.insert(is_target.end(), tokens.size(), target ? 1 : 0);
  }
};

void validate_options(const PrepareOptions& o) {
  require_config(!o.out.empty(), "--out: name the folder to write");
  require_config(o.texts.empty() != o.token_files.empty(),
                 "give either --domain NAME=PATH (text) or --tokens NAME=FILE (token ids)");
  require_config(o.tokenizer.empty() || o.token_files.empty(),
                 "--tokenizer {}: goes with --domain, not with --tokens, which are token ids already",
                 o.tokenizer.string());
  require_config(o.validation_fraction > 0.0 && o.validation_fraction < 1.0,
                 "--validation-fraction {}: must be above 0 and below 1", o.validation_fraction);
  require_config(o.vocab_size >= 300 || !o.token_files.empty(),
                 "--vocab-size {}: needs at least 300 (256 bytes and some pieces)", o.vocab_size);
  require_config(o.vocab_size >= 1 && o.vocab_size <= std::numeric_limits<std::int32_t>::max(),
                 "--vocab-size {}: out of range", o.vocab_size);
  if (!path_exists(o.out)) return;
  require_config(path_exists(o.out / "dataset.json"), "--out {}: exists and was not made by prepare",
                 o.out.string());
  require_config(o.force, "--out {}: exists already; pass --force to replace it", o.out.string());
}

void tokenize_texts(const Corpus& corpus, const Tokenizer& tokenizer, Tokens& tokens, PrepareSummary& summary,
                    const std::function<void(const std::string&)>& progress) {
  for (std::size_t domain = 0; domain < corpus.domains.size(); ++domain) {
    tokens.index.domains.push_back(corpus.domains[domain].name);
    for (const fs::path& file : corpus.domains[domain].files) {
      for (const SourceText& source : read_texts(file)) {
        Document document{.name = source.name,
                          .begin = static_cast<std::int64_t>(tokens.ids.size()),
                          .end = 0,
                          .domain = static_cast<std::int64_t>(domain),
                          .split = Split::kTrain};
        // Part of a prompt; elsewhere a target like any other, as in data that have no prompts.
        if (tokenizer.bos_id() >= 0) tokens.append({tokenizer.bos_id()}, source.prompt.empty());
        tokens.append(tokenizer.encode(source.prompt, false), false);
        tokens.append(tokenizer.encode(source.text, false), true);
        if (tokenizer.eos_id() >= 0) tokens.append({tokenizer.eos_id()}, true);
        document.end = static_cast<std::int64_t>(tokens.ids.size());
        tokens.index.documents.push_back(document);
        summary.text_bytes += static_cast<std::int64_t>(source.prompt.size() + source.text.size());
        tokens.index.has_loss_mask = tokens.index.has_loss_mask || !source.prompt.empty();
      }
    }
    progress(fmt::format("tokenised domain {} ({} files)", corpus.domains[domain].name,
                         corpus.domains[domain].files.size()));
  }
}

void read_token_file(const DomainPath& entry, std::int64_t vocab_size, Tokens& tokens) {
  const SafetensorsFile file(entry.path);
  const auto found = file.tensors().find("input_ids");
  require_config(found != file.tensors().end() && found->second.dtype == "I64",
                 "{}: needs a tensor input_ids of int64", entry.path.string());
  auto domain = std::find(tokens.index.domains.begin(), tokens.index.domains.end(), entry.domain);
  if (domain == tokens.index.domains.end()) domain = tokens.index.domains.insert(domain, entry.domain);
  Document document{.name = entry.path.filename().string(),
                    .begin = static_cast<std::int64_t>(tokens.ids.size()),
                    .end = 0,
                    .domain = domain - tokens.index.domains.begin(),
                    .split = Split::kTrain};
  const auto bytes = file.bytes(found->second);
  for (std::size_t i = 0; i < bytes.size() / sizeof(std::int64_t); ++i) {
    std::int64_t id = 0;
    std::memcpy(&id, bytes.data() + i * sizeof(id), sizeof(id));
    require_config(id >= 0 && id < vocab_size, "{}: input_ids[{}] = {}: must lie in [0, --vocab-size {})",
                   entry.path.string(), i, id, vocab_size);
    tokens.append({id}, true);
  }
  document.end = static_cast<std::int64_t>(tokens.ids.size());
  tokens.index.documents.push_back(document);
}

std::int64_t length_of(const Document& document) { return document.end - document.begin; }

// A document gives the last of its tokens to validation: it becomes two.
void split_in_two(std::vector<Document>& documents, std::size_t which, double tail_tokens) {
  Document& head = documents[which];
  Document tail = head;
  head.end -= static_cast<std::int64_t>(std::ceil(tail_tokens));
  tail.begin = head.end;
  tail.name += " (tail)";
  tail.split = Split::kValidation;
  documents.insert(documents.begin() + static_cast<std::ptrdiff_t>(which) + 1, tail);
}

// In the order of their names' hashes, documents go to validation until it has its share of the domain's
// tokens. One that would make it more than twice the share stays; the first of these gives its tail where the
// others do not suffice.
void split_domain(DatasetIndex& index, std::vector<std::size_t> members, double wanted) {
  const auto key = [&](std::size_t i) {
    return hash_name(fs::path(index.documents[i].name).filename().string());
  };
  std::stable_sort(members.begin(), members.end(), [&](auto a, auto b) { return key(a) < key(b); });
  double taken = 0.0;
  std::size_t num_taken = 0;
  std::optional<std::size_t> too_long;
  for (std::size_t n = 0; n < members.size() && taken < wanted; ++n) {
    Document& document = index.documents[members[n]];
    const auto length = static_cast<double>(length_of(document));
    if (taken + length > 2.0 * wanted) {
      if (!too_long) too_long = members[n];
    } else if (num_taken + 1 < members.size()) {  // one is left to train on
      document.split = Split::kValidation;
      taken += length;
      ++num_taken;
    }
  }
  if (taken < wanted && too_long) split_in_two(index.documents, *too_long, wanted - taken);
}

void split_documents(DatasetIndex& index, double fraction) {
  for (std::size_t domain = 0; domain < index.domains.size(); ++domain) {
    std::vector<std::size_t> members;
    std::int64_t total = 0;
    for (std::size_t i = 0; i < index.documents.size(); ++i) {
      if (index.documents[i].domain != static_cast<std::int64_t>(domain)) continue;
      members.push_back(i);
      total += length_of(index.documents[i]);
    }
    const double wanted = static_cast<double>(total) * fraction;
    if (members.size() == 1) {
      split_in_two(index.documents, members[0], wanted);
    } else {
      split_domain(index, std::move(members), wanted);
    }
  }
}

void require_tokens(const DatasetIndex& index) {
  std::vector<std::int64_t> num_documents(index.domains.size(), 0);
  std::int64_t train = 0;
  std::int64_t validation = 0;
  for (const Document& document : index.documents) {
    ++num_documents[static_cast<std::size_t>(document.domain)];
    (document.split == Split::kTrain ? train : validation) += document.end - document.begin;
  }
  for (std::size_t domain = 0; domain < index.domains.size(); ++domain) {
    require_config(num_documents[domain] > 0, "domain {}: its files hold no document", index.domains[domain]);
  }
  require_config(train > 0 && validation > 0,
                 "the corpus has {} training and {} validation tokens; both splits need some", train,
                 validation);
}

// Cross-entropy of the validation tokens under the train tokens' frequencies, one count added to each.
double unigram_entropy(const Tokens& tokens) {
  std::vector<double> counts(static_cast<std::size_t>(tokens.index.vocab_size), 1.0);
  double total = static_cast<double>(tokens.index.vocab_size);
  for (const Document& document : tokens.index.documents) {
    if (document.split != Split::kTrain) continue;
    for (std::int64_t i = document.begin; i < document.end; ++i)
      counts[tokens.ids[static_cast<std::size_t>(i)]] += 1.0;
    total += static_cast<double>(document.end - document.begin);
  }
  double sum = 0.0;
  double number = 0.0;
  for (const Document& document : tokens.index.documents) {
    if (document.split != Split::kValidation) continue;
    for (std::int64_t i = document.begin; i < document.end; ++i) {
      sum -= std::log(counts[tokens.ids[static_cast<std::size_t>(i)]] / total);
      number += 1.0;
    }
  }
  return number > 0.0 ? sum / number : 0.0;
}

void write_folder(const fs::path& folder, Tokens& tokens) {
  const auto ids = std::as_bytes(std::span(tokens.ids));
  tokens.index.num_tokens = static_cast<std::int64_t>(tokens.ids.size());
  tokens.index.tokens_checksum = checksum(ids);
  AtomicFile token_file(folder / "tokens.bin");
  token_file.write(ids);
  token_file.commit();
  if (tokens.index.has_loss_mask) {
    const auto mask = std::as_bytes(std::span(tokens.is_target));
    tokens.index.loss_mask_checksum = checksum(mask);
    AtomicFile mask_file(folder / "loss_mask.bin");
    mask_file.write(mask);
    mask_file.commit();
  }
  write_file_atomically(folder / "dataset.json", write_fields(tokens.index).dump(1));
}

}  // namespace

PrepareSummary prepare(const PrepareOptions& options,
                       const std::function<void(const std::string&)>& progress) {
  validate_options(options);
  PrepareSummary summary;
  Tokens tokens;
  Corpus corpus;
  if (!options.texts.empty()) corpus = find_texts(options.texts);
  summary.num_skipped = corpus.num_skipped;
  const fs::path out = options.out.filename().empty() ? options.out.parent_path() : options.out;
  TemporaryFolder folder(fmt::format("{}.tmp-{:08x}", out.string(), std::random_device()()));
  if (!options.texts.empty()) {
    const fs::path model_file = folder.path() / "tokenizer.model";
    if (options.tokenizer.empty()) {
      progress(fmt::format("training a tokenizer of {} pieces", options.vocab_size));
      train_tokenizer(corpus, options.vocab_size, model_file);
    } else {
      Tokenizer::load(options.tokenizer);  // an error names the user's file, not its copy
      write_file_atomically(model_file, read_file(options.tokenizer));
    }
    const Tokenizer tokenizer = Tokenizer::load(model_file);
    tokens.index.vocab_size = tokenizer.vocab_size();
    tokens.index.tokenizer_checksum = tokenizer.checksum();
    tokenize_texts(corpus, tokenizer, tokens, summary, progress);
  } else {
    tokens.index.vocab_size = options.vocab_size;
    for (const DomainPath& entry : options.token_files) read_token_file(entry, options.vocab_size, tokens);
  }
  split_documents(tokens.index, options.validation_fraction);
  require_tokens(tokens.index);
  tokens.index.unigram_entropy = unigram_entropy(tokens);
  write_folder(folder.path(), tokens);
  folder.move_to(out);
  summary.index = tokens.index;
  return summary;
}

}  // namespace collegium::data
