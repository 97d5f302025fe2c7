// SPDX-License-Identifier: Apache-2.0
#pragma once

// Corpora of token ids that a program makes, where no text is at hand.

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

namespace collegium::data {

/// A domain's name and its tokens, one document.
struct MadeDomain {
  std::string name;
  std::vector<std::int64_t> ids;
};

/// What     prepare() of these ids into `folder`/data, which must not be in use; says nothing.
/// Throws   ConfigError: an id outside the vocabulary, a domain without tokens; what prepare() throws.
void prepare_made_corpus(const std::filesystem::path& folder, const std::vector<MadeDomain>& domains,
                         std::int64_t vocab_size, double validation_fraction);

/// What     Two domains that an n-gram model can learn: counting up modulo `vocab_size`, and down modulo
///          one less. `vocab_size` is at least 2.
std::vector<MadeDomain> counting_domains(std::int64_t vocab_size);

}  // namespace collegium::data
