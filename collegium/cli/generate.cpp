// SPDX-License-Identifier: Apache-2.0
#include "collegium/model/generate.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <CLI/CLI.hpp>
#include <charconv>
#include <limits>
#include <memory>
#include <optional>

#include "collegium/base/error.h"
#include "collegium/cli/launch.h"
#include "collegium/cli/load_model.h"
#include "collegium/cli/verb.h"
#include "collegium/data/tokenizer.h"
#include "collegium/model/tensor_io.h"

namespace collegium::cli {

namespace {

struct GenerateArguments {
  std::string model;
  std::string prompt;
  std::optional<std::string> ids;
  std::string dtype = "float32";
  model::SamplingOptions sampling;
  LaunchOptions launch;
  bool json = false;
};

std::vector<std::int64_t> parse_ids(const std::string& text) {
  std::vector<std::int64_t> ids;
  for (const char* place = text.data(); place <= text.data() + text.size();) {
    std::int64_t id = 0;
    const auto [end, error] = std::from_chars(place, text.data() + text.size(), id);
    const bool last = end == text.data() + text.size();
    require_config(error == std::errc() && (last || *end == ','),
                   "--ids \"{}\": must be token ids, such as 1,17,42", text);
    ids.push_back(id);
    place = end + 1;
  }
  return ids;
}

// On all ranks; rank 0 shows the text.
void continue_prompt(const GenerateArguments& arguments, const LoadedModel& model,
                     const std::vector<std::int64_t>& prompt,
                     const std::optional<data::Tokenizer>& tokenizer) {
  std::vector<std::int64_t> all = prompt;
  std::size_t shown = 0;
  const auto stream = [&](std::int64_t id) {
    all.push_back(id);
    if (arguments.json || !tokenizer) return;
    // Decoded anew each time: a character may need several byte tokens; before the last it is U+FFFD.
    const std::string text = tokenizer->decode(all);
    if (text.size() > shown && !text.ends_with("\xEF\xBF\xBD")) {
      fmt::print("{}", text.substr(shown));
      std::fflush(stdout);
      shown = text.size();
    }
  };
  comm::Communicator& world = *model.groups.world;
  const comm::WhereScope scope(world.where(), {.step = -1, .layer = -1, .phase = "generation"});
  const std::vector<std::int64_t> tokens =
      model::generate(model.decoder, prompt, arguments.sampling, stream, &world);
  if (!model.groups.is_root()) return;
  if (arguments.json) {
    Json json = {{"prompt_ids", prompt}, {"ids", tokens}};
    if (tokenizer) json["text"] = tokenizer->decode(all);
    fmt::print("{}\n", json.dump(-1, ' ', false, Json::error_handler_t::replace));
  } else if (tokenizer) {
    fmt::print("{}\n", tokenizer->decode(all).substr(shown));
  } else {
    fmt::print("{}\n", fmt::join(tokens, " "));
  }
}

void run(GenerateArguments& arguments) {
  model::validate(arguments.sampling);
  require_config(arguments.prompt.empty() == arguments.ids.has_value(),
                 "generate: give either --prompt or --ids");
  const at::ScalarType dtype = model::parse_dtype(arguments.dtype, "--dtype");
  const model::ModelConfig config = model::read_model_config(arguments.model);
  model::validate(config, /*training=*/false);
  model::require_generation(config, "generate");
  arguments.sampling.eos_ids = model::read_eos_ids(arguments.model, config);
  std::optional<data::Tokenizer> tokenizer;
  std::vector<std::int64_t> prompt;
  if (arguments.ids) {
    prompt = parse_ids(*arguments.ids);
  } else {
    tokenizer = data::Tokenizer::load(std::filesystem::path(arguments.model));
    prompt = tokenizer->encode(arguments.prompt, /*add_bos=*/true);
    if (arguments.sampling.eos_ids.empty()) arguments.sampling.eos_ids = {tokenizer->eos_id()};
  }
  launch(arguments.launch, [&](const std::shared_ptr<comm::Communicator>& world) {
    continue_prompt(arguments, load_model(arguments.model, config, dtype, world), prompt, tokenizer);
  });
}

}  // namespace

void add_generate(CLI::App& app) {
  auto arguments = std::make_shared<GenerateArguments>();
  CLI::App* verb = app.add_subcommand("generate", "Continue a text");
  verb->add_option("--model", arguments->model,
                   "model directory, checkpoint, or run folder (its newest checkpoint)")
      ->required();
  verb->add_option("--prompt", arguments->prompt, "text to continue");
  verb->add_option("--ids", arguments->ids,
                   "token ids to continue (1,17,42), for models whose tokenizer is not SentencePiece");
  verb->add_option("--max-tokens", arguments->sampling.max_tokens, "tokens to add")->capture_default_str();
  verb->add_option("--temperature", arguments->sampling.temperature, "0 = always the likeliest token")
      ->capture_default_str();
  verb->add_option("--top-k", arguments->sampling.top_k, "sample from the k likeliest; 0 = all")
      ->capture_default_str();
  verb->add_option("--top-p", arguments->sampling.top_p, "sample from the smallest set with this probability")
      ->capture_default_str();
  verb->add_option("--seed", arguments->sampling.seed, "of the sampling")
      ->check(CLI::Range(std::int64_t{0}, std::numeric_limits<std::int64_t>::max()))
      ->capture_default_str();
  verb->add_option("--dtype", arguments->dtype, "float64, float32 or bfloat16")->capture_default_str();
  verb->add_flag("--json", arguments->json, "print one JSON object");
  add_launch_options(*verb, arguments->launch);
  verb->footer(
      "Examples:\n"
      "  collegium generate --model runs/demo --prompt \"KING. \" --temperature 0.8 --top-p "
      "0.95\n"
      "  collegium generate --model DIR --ids 1,17,42 --temperature 0 --json --ranks 2");
  verb->callback([arguments] {
    arguments->model = find_model(arguments->model);
    run(*arguments);
  });
}

}  // namespace collegium::cli
