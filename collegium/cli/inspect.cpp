// SPDX-License-Identifier: Apache-2.0
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/tensor.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <CLI/CLI.hpp>
#include <memory>

#include "collegium/base/error.h"
#include "collegium/base/file.h"
#include "collegium/cli/launch.h"
#include "collegium/cli/load_model.h"
#include "collegium/cli/verb.h"
#include "collegium/data/tokenizer.h"
#include "collegium/model/decoder.h"
#include "collegium/model/tensor_io.h"
#include "collegium/moe/monitors.h"

namespace collegium::cli {

namespace {

struct InspectArguments {
  std::string model;
  std::string text;
  std::string file;
  std::string input;
  std::string dtype = "float32";
  LaunchOptions launch;
  bool json = false;
};

struct Tokens {
  std::vector<std::int64_t> ids;
  std::vector<std::string> pieces;
};

Tokens read_tokens(const InspectArguments& arguments, const model::ModelConfig& config) {
  const int given =
      (arguments.text.empty() ? 0 : 1) + (arguments.file.empty() ? 0 : 1) + (arguments.input.empty() ? 0 : 1);
  require_config(given == 1, "inspect: give one of --text, --file and --input");
  Tokens tokens;
  if (!arguments.input.empty()) {
    const at::Tensor all_ids = model::read_tensor(SafetensorsFile(arguments.input), "input_ids");
    require_config(all_ids.dim() <= 1 || all_ids.numel() == all_ids.size(-1),
                   "{}: input_ids has shape [{}]: inspect takes one sequence", arguments.input,
                   fmt::join(all_ids.sizes(), ", "));
    const at::Tensor ids = all_ids.reshape({-1}).contiguous();
    require_config(ids.scalar_type() == at::kLong, "{}: input_ids must be int64", arguments.input);
    tokens.ids.assign(ids.const_data_ptr<std::int64_t>(), ids.const_data_ptr<std::int64_t>() + ids.numel());
    for (const std::int64_t id : tokens.ids) tokens.pieces.push_back(std::to_string(id));
  } else {
    const data::Tokenizer tokenizer = data::Tokenizer::load(std::filesystem::path(arguments.model));
    tokens.ids = tokenizer.encode(arguments.text.empty() ? read_file(arguments.file) : arguments.text,
                                  /*add_bos=*/true);
    for (const std::int64_t id : tokens.ids) tokens.pieces.push_back(tokenizer.piece(id));
  }
  for (const std::int64_t id : tokens.ids) {
    require_config(id >= 0 && id < config.vocab_size, "token {}: must lie in [0, vocab_size = {})", id,
                   config.vocab_size);
  }
  require_config(!tokens.ids.empty(), "inspect: there is no token to look at");
  require_config(static_cast<std::int64_t>(tokens.ids.size()) <= config.max_positions,
                 "{} tokens: more than max_positions = {}", tokens.ids.size(), config.max_positions);
  return tokens;
}

// "3:0.61 1:0.39": experts with their weights, the largest first.
std::string choices(const moe::LayerRun& run, std::int64_t token) {
  std::string text;
  const auto& routing = run.routing;
  for (std::int64_t k = 0; k < routing.expert_ids_TK.size(1); ++k) {
    const auto expert = routing.expert_ids_TK[token][k].item<std::int32_t>();
    if (expert < 0) continue;
    if (!text.empty()) text.push_back(' ');
    text += fmt::format("{:>2}:{:.2f}", expert, routing.weights_TK[token][k].item<double>());
  }
  return text;
}

void print_table(const Tokens& tokens, const model::ForwardResult& forward,
                 const model::ModelConfig& config) {
  fmt::print("expert:weight of every token in every MoE layer; one line is the token's path\n\n{:>5}  {:<14}",
             "", "token");
  const std::size_t width = static_cast<std::size_t>(config.moe.top_k) * 8;
  for (const auto& layer : forward.layers)
    fmt::print(" | {:<{}}", fmt::format("layer {}", layer->context.layer), width);
  fmt::print("\n");
  for (std::size_t t = 0; t < tokens.ids.size(); ++t) {
    fmt::print("{:>5}  {:<14}", t, tokens.pieces[t]);
    for (const auto& layer : forward.layers)
      fmt::print(" | {:<{}}", choices(*layer, static_cast<std::int64_t>(t)), width);
    fmt::print("\n");
  }
  fmt::print("\nload per expert (1.00 = its share)\n");
  for (const auto& layer : forward.layers) {
    moe::MonitorSums sums(config.moe.num_experts);
    sums.add(moe::RouterTotals(layer->statistics), layer->statistics.max_abs_logit);
    const moe::LayerMonitors monitors = sums.monitors(config.moe);
    fmt::print("layer {:>2}: {:.2f}  (entropy {:.2f} of 1, {} experts unused)\n", layer->context.layer,
               fmt::join(monitors.load, " "), monitors.router_entropy, monitors.dead_experts);
  }
}

void print_json(const Tokens& tokens, const model::ForwardResult& forward) {
  Json layers = Json::array();
  for (const auto& layer : forward.layers) {
    Json experts = Json::array();
    Json weights = Json::array();
    const at::Tensor ids = layer->routing.expert_ids_TK;
    for (std::int64_t t = 0; t < ids.size(0); ++t) {
      Json id_row = Json::array();
      Json weight_row = Json::array();
      for (std::int64_t k = 0; k < ids.size(1); ++k) {
        id_row.push_back(ids[t][k].item<std::int32_t>());
        weight_row.push_back(layer->routing.weights_TK[t][k].item<double>());
      }
      experts.push_back(id_row);
      weights.push_back(weight_row);
    }
    layers.push_back({{"layer", layer->context.layer}, {"experts", experts}, {"weights", weights}});
  }
  fmt::print("{}\n", Json{{"ids", tokens.ids}, {"pieces", tokens.pieces}, {"layers", layers}}.dump());
}

// Rank 0 has the tokens; the others take part in the layers' exchanges.
void route(const InspectArguments& arguments, const LoadedModel& model, const Tokens& tokens) {
  const bool is_root = model.groups.is_root();
  const comm::WhereScope scope(model.groups.world->where(), {.step = -1, .layer = -1, .phase = "inspection"});
  const at::NoGradGuard no_grad;
  const at::Tensor ids_BS = at::tensor(tokens.ids, at::kLong).unsqueeze(0).narrow(0, 0, is_root ? 1 : 0);
  const model::ForwardResult forward = model.decoder.forward(ids_BS, {});
  if (!is_root) return;
  if (arguments.json) {
    print_json(tokens, forward);
  } else {
    print_table(tokens, forward, model.decoder.config());
  }
}

void run(const InspectArguments& arguments) {
  const at::ScalarType dtype = model::parse_dtype(arguments.dtype, "--dtype");
  const model::ModelConfig config = model::read_model_config(arguments.model);
  model::validate(config, /*training=*/false);
  moe::require_single_sequences(config.moe, "inspect");
  const Tokens tokens = read_tokens(arguments, config);
  launch(arguments.launch, [&](const std::shared_ptr<comm::Communicator>& world) {
    route(arguments, load_model(arguments.model, config, dtype, world), tokens);
  });
}

}  // namespace

void add_inspect(CLI::App& app) {
  auto arguments = std::make_shared<InspectArguments>();
  CLI::App* verb = app.add_subcommand("inspect", "Which experts take each token of a text, layer by layer");
  verb->add_option("--model", arguments->model,
                   "model directory, checkpoint, or run folder (its newest checkpoint)")
      ->required();
  verb->add_option("--text", arguments->text, "text to route");
  verb->add_option("--file", arguments->file, "file with the text");
  verb->add_option("--input", arguments->input,
                   "safetensors with input_ids, for models whose tokenizer is not SentencePiece");
  verb->add_option("--dtype", arguments->dtype, "float64, float32 or bfloat16")->capture_default_str();
  verb->add_flag("--json", arguments->json, "print one JSON object");
  add_launch_options(*verb, arguments->launch);
  verb->footer(
      "Examples:\n"
      "  collegium inspect --model runs/demo --text \"def main(): To be, or not to be\"\n"
      "  collegium inspect --model DIR --input ids.safetensors --json --ranks 4");
  verb->callback([arguments] {
    arguments->model = find_model(arguments->model);
    run(*arguments);
  });
}

}  // namespace collegium::cli
