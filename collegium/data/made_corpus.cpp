// SPDX-License-Identifier: Apache-2.0
#include "collegium/data/made_corpus.h"

#include <span>

#include "collegium/base/safetensors.h"
#include "collegium/data/prepare.h"

namespace collegium::data {

void prepare_made_corpus(const std::filesystem::path& folder, const std::vector<MadeDomain>& domains,
                         std::int64_t vocab_size, double validation_fraction) {
  std::filesystem::create_directories(folder);
  PrepareOptions options{.out = folder / "data",
                         .texts = {},
                         .token_files = {},
                         .tokenizer = {},
                         .vocab_size = vocab_size,
                         .validation_fraction = validation_fraction,
                         .force = true};
  for (const MadeDomain& domain : domains) {
    const auto file = folder / (domain.name + ".safetensors");
    const auto count = static_cast<std::int64_t>(domain.ids.size());
    write_safetensors(file, {{.name = "input_ids", .dtype = "I64", .shape = {count}, .bytes = [&] {
                                const auto bytes = std::as_bytes(std::span(domain.ids));
                                return std::vector<std::byte>(bytes.begin(), bytes.end());
                              }}});
    options.token_files.push_back({.domain = domain.name, .path = file});
  }
  prepare(options, [](const std::string&) {});
}

std::vector<MadeDomain> counting_domains(std::int64_t vocab_size) {
  constexpr std::int64_t kTokens = 3000;
  MadeDomain up{.name = "up", .ids = {}};
  MadeDomain down{.name = "down", .ids = {}};
  for (std::int64_t i = 0; i < kTokens; ++i) {
    up.ids.push_back(i % vocab_size);
    down.ids.push_back((kTokens - i) % (vocab_size - 1));
  }
  return {up, down};
}

}  // namespace collegium::data
