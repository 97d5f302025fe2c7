// SPDX-License-Identifier: Apache-2.0
#pragma once

// Text (or token ids from elsewhere) to a prepared corpus.

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "collegium/data/corpus.h"
#include "collegium/data/dataset.h"

namespace collegium::data {

struct PrepareOptions {
  std::filesystem::path out;
  std::vector<DomainPath> texts;
  std::vector<DomainPath> token_files;  ///< safetensors with `input_ids` int64 [N], instead of texts
  std::filesystem::path tokenizer;      ///< an existing tokenizer.model; empty = train one
  std::int64_t vocab_size = 8192;
  double validation_fraction = 0.05;
  bool force = false;  ///< replace a folder that prepare made
};

struct PrepareSummary {
  DatasetIndex index;
  std::int64_t num_skipped = 0;
  std::int64_t text_bytes = 0;
};

/// What     Tokenises every text, splits documents into train and validation, and writes the folder under a
///          temporary name that is renamed at the end: a killed run leaves nothing that looks like a
///          corpus. With `force`, the older folder is removed only after that.
/// Order    A function of the files' paths and contents: reruns give the same bytes. A document's split
///          follows from the hash of its name, except that none is taken which would more than double its
///          domain's share of validation; where no others suffice, a document gives its tail.
/// Throws   ConfigError for wrong options, domains without a document, splits without a token and existing
///          folders; Error when the disk is full.
PrepareSummary prepare(const PrepareOptions& options,
                       const std::function<void(const std::string&)>& progress);

}  // namespace collegium::data
