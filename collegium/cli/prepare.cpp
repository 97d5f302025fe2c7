// SPDX-License-Identifier: Apache-2.0
#include "collegium/data/prepare.h"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <memory>

#include "collegium/base/log.h"
#include "collegium/base/units.h"
#include "collegium/cli/signals.h"
#include "collegium/cli/verb.h"

namespace collegium::cli {

namespace {

struct PrepareArguments {
  data::PrepareOptions options;
  std::string out;
  std::string tokenizer;
  std::vector<std::string> domains;
  std::vector<std::string> tokens;
  bool json = false;
};

Json summary_json(const data::PrepareSummary& summary, const std::string& out) {
  Json domains = Json::object();
  for (std::size_t d = 0; d < summary.index.domains.size(); ++d) {
    std::int64_t train = 0;
    std::int64_t validation = 0;
    std::int64_t documents = 0;
    for (const data::Document& document : summary.index.documents) {
      if (document.domain != static_cast<std::int64_t>(d)) continue;
      ++documents;
      (document.split == data::Split::kTrain ? train : validation) += document.end - document.begin;
    }
    domains[summary.index.domains[d]] = {
        {"documents", documents}, {"train_tokens", train}, {"validation_tokens", validation}};
  }
  return {{"out", out},
          {"vocab_size", summary.index.vocab_size},
          {"num_tokens", summary.index.num_tokens},
          {"text_bytes", summary.text_bytes},
          {"skipped_files", summary.num_skipped},
          {"unigram_entropy", summary.index.unigram_entropy},
          {"domains", domains}};
}

void run(PrepareArguments& arguments) {
  remove_temporary_folders_on_signals();
  data::PrepareOptions& options = arguments.options;
  options.out = arguments.out;
  options.tokenizer = arguments.tokenizer;
  for (const std::string& text : arguments.domains)
    options.texts.push_back(data::parse_domain_path("--domain", text));
  for (const std::string& text : arguments.tokens)
    options.token_files.push_back(data::parse_domain_path("--tokens", text));
  const data::PrepareSummary summary =
      data::prepare(options, [](const std::string& line) { log_info(line); });
  const Json json = summary_json(summary, arguments.out);
  if (arguments.json) {
    fmt::print("{}\n", json.dump());
    return;
  }
  fmt::print("{}: {} tokens of {} pieces", arguments.out, summary.index.num_tokens, summary.index.vocab_size);
  if (summary.text_bytes > 0) {
    fmt::print(", {} of text ({:.2f} bytes/token)", format_bytes(static_cast<double>(summary.text_bytes)),
               static_cast<double>(summary.text_bytes) / static_cast<double>(summary.index.num_tokens));
  }
  fmt::print("\n");
  for (const auto& [name, domain] : json["domains"].items()) {
    fmt::print("  {:<12} {:>6} documents {:>10} train tokens {:>9} validation tokens\n", name,
               domain["documents"].get<std::int64_t>(), domain["train_tokens"].get<std::int64_t>(),
               domain["validation_tokens"].get<std::int64_t>());
  }
  if (summary.num_skipped > 0)
    fmt::print("  skipped {} files (empty, binary or not UTF-8)\n", summary.num_skipped);
  fmt::print("  unigram entropy of the validation split: {:.4f} nats/token\n", summary.index.unigram_entropy);
}

}  // namespace

void add_prepare(CLI::App& app) {
  auto arguments = std::make_shared<PrepareArguments>();
  CLI::App* verb = app.add_subcommand("prepare", "Text files to a tokenizer and a memory-mapped token file");
  verb->add_option("--out", arguments->out, "folder to write")->required();
  verb->add_option("--domain", arguments->domains,
                   "NAME=PATH: a file or folder of text; repeat for more (.jsonl: prompt and completion)");
  verb->add_option("--tokens", arguments->tokens,
                   "NAME=FILE: safetensors with input_ids int64 [N], for other tokenizers");
  CLI::Option* tokenizer = verb->add_option("--tokenizer", arguments->tokenizer,
                                            "an existing SentencePiece tokenizer.model (else one is trained)")
                               ->check(CLI::ExistingFile);
  verb->add_option("--vocab-size", arguments->options.vocab_size,
                   "pieces of the trained tokenizer; with --tokens: of the one that made them")
      ->excludes(tokenizer)
      ->capture_default_str();
  verb->add_option("--validation-fraction", arguments->options.validation_fraction,
                   "share of every domain's tokens, in whole documents unless these are too long")
      ->capture_default_str();
  verb->add_flag("--force", arguments->options.force, "replace a folder that prepare made");
  verb->add_flag("--json", arguments->json, "print one JSON object");
  verb->footer(
      "Examples:\n"
      "  collegium prepare --out data/mine --domain code=src --domain prose=notes --vocab-size 4096\n"
      "  collegium prepare --out data/chat --domain chat=dialogues.jsonl --tokenizer DIR/tokenizer.model\n"
      "  collegium prepare --out data/ids --tokens web=ids.safetensors --vocab-size 151936");
  verb->callback([arguments] { run(*arguments); });
}

}  // namespace collegium::cli
