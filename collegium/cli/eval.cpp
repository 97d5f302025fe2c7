// SPDX-License-Identifier: Apache-2.0
#include <ATen/ATen.h>
#include <fmt/format.h>

#include <memory>

#include "collegium/base/error.h"
#include "collegium/cli/verb.h"
#include "collegium/data/dataset.h"
#include "collegium/model/checkpoint_io.h"
#include "collegium/model/decoder.h"
#include "collegium/model/tensor_io.h"
#include "collegium/moe/balance.h"
#include "collegium/ops/threads.h"
#include "collegium/train/validation.h"

namespace collegium::cli {

namespace {

struct EvalArguments {
  std::string model;
  std::string input;
  std::string data;
  std::int64_t sequence_length = 512;
  std::int64_t max_sequences = 64;
  std::string dtype = "float32";
  std::string logits_file;
  std::string grads_file;
  bool json = false;
};

at::Tensor read_input_ids(const std::string& path, std::int64_t vocab_size) {
  const SafetensorsFile file(path);
  const at::Tensor ids = model::read_tensor(file, "input_ids");
  require_config(ids.scalar_type() == at::kLong && ids.dim() == 2,
                 "{}: input_ids must be int64 [B, S], it is {} with {} dims", path,
                 model::safetensors_dtype(ids.scalar_type()), ids.dim());
  require_config(ids.size(0) >= 1 && ids.size(1) >= 2,
                 "{}: input_ids is [{}, {}]: needs at least one sequence of two tokens", path, ids.size(0),
                 ids.size(1));
  const at::Tensor outside = at::nonzero((ids < 0).logical_or(ids >= vocab_size));
  if (outside.size(0) > 0) {
    const auto b = outside[0][0].item<std::int64_t>();
    const auto s = outside[0][1].item<std::int64_t>();
    throw ConfigError(fmt::format("{}: input_ids[{}, {}] = {}: must lie in [0, vocab_size = {})", path, b, s,
                                  ids[b][s].item<std::int64_t>(), vocab_size));
  }
  return ids;
}

std::vector<std::pair<std::string, at::Tensor>> disk_gradients(const model::Decoder& decoder) {
  std::vector<std::pair<std::string, at::Tensor>> gradients;
  const auto& parameters = decoder.parameters();
  for (const model::DiskTensor& disk : model::list_disk_tensors(decoder.config(), parameters)) {
    const model::Parameter& parameter = parameters[disk.parameter];
    if (!parameter.trainable) continue;
    const at::Tensor gradient =
        parameter.value.grad().defined() ? parameter.value.grad() : at::zeros_like(parameter.value);
    gradients.emplace_back(disk.name, model::disk_view(disk, gradient));
  }
  return gradients;
}

struct EvalResult {
  double loss = 0.0;
  double aux_loss = 0.0;
  double total_loss = 0.0;
  std::int64_t num_targets = 0;
};

EvalResult evaluate_ids(const EvalArguments& arguments, const model::Decoder& decoder,
                        const at::Tensor& ids_BS) {
  const bool want_gradients = !arguments.grads_file.empty();
  const at::AutoGradMode mode(want_gradients);
  const model::ForwardResult forward = decoder.forward(ids_BS, {});
  if (!arguments.logits_file.empty()) {
    const at::NoGradGuard no_grad;
    model::write_tensors(arguments.logits_file, {{"logits", decoder.logits(forward.hidden_BSD)}});
  }
  const std::int64_t length = ids_BS.size(1) - 1;
  const at::Tensor sum =
      model::cross_entropy_sum(decoder, forward.hidden_BSD.narrow(1, 0, length), ids_BS.narrow(1, 1, length));
  EvalResult result;
  result.num_targets = ids_BS.size(0) * length;
  const at::Tensor loss = sum / static_cast<double>(result.num_targets);
  result.loss = loss.item<double>();

  const model::ModelConfig& config = decoder.config();
  std::vector<moe::RouterStatistics> statistics;
  for (const auto& layer : forward.layers) statistics.push_back(layer->statistics);
  std::vector<moe::RouterStatisticsGradient> gradients(statistics.size());
  const double coefficient = config.output_router_logits ? config.router_aux_loss_coef : 0.0;
  result.aux_loss = moe::hf_pooled_loss(config.moe, statistics, coefficient, gradients);
  result.total_loss = result.loss + coefficient * result.aux_loss;
  if (want_gradients) {
    for (std::size_t i = 0; i < gradients.size(); ++i) forward.layers[i]->statistics_gradient = gradients[i];
    loss.backward();
    model::write_tensors(arguments.grads_file, disk_gradients(decoder));
  }
  return result;
}

void print(const EvalArguments& arguments, const EvalResult& result) {
  if (arguments.json) {
    const Json json = {{"loss", result.loss},
                       {"aux_loss", result.aux_loss},
                       {"total_loss", result.total_loss},
                       {"num_targets", result.num_targets},
                       {"dtype", arguments.dtype}};
    fmt::print("{}\n", json.dump());
    return;
  }
  fmt::print("loss        {:.6f} nats/token over {} target tokens\n", result.loss, result.num_targets);
  fmt::print("aux loss    {:.6f} (Hugging Face's pooled form; top_k = balanced)\n", result.aux_loss);
  fmt::print("total loss  {:.6f} (with the aux loss where the model's config.json asks for it)\n",
             result.total_loss);
}

void run(const EvalArguments& arguments) {
  ops::bind_threads();
  require_config(arguments.input.empty() != arguments.data.empty(), "eval: give either --input or --data");
  const at::ScalarType dtype = model::parse_dtype(arguments.dtype, "--dtype");
  const model::ModelConfig config = model::read_model_config(arguments.model);
  model::validate(config, /*training=*/false);
  at::Tensor ids_BS;
  if (!arguments.input.empty()) ids_BS = read_input_ids(arguments.input, config.vocab_size);
  const model::Decoder decoder(config, model::load_parameters(arguments.model, config, dtype));
  if (ids_BS.defined()) {
    print(arguments, evaluate_ids(arguments, decoder, ids_BS));
    return;
  }
  require_config(arguments.logits_file.empty() && arguments.grads_file.empty(),
                 "eval: --logits and --grads need --input");
  const data::Dataset dataset(arguments.data);
  train::check_vocabulary(dataset, config);
  const train::ValidationResult validation = train::validate_model(
      decoder, dataset, arguments.sequence_length, arguments.max_sequences, /*mask_documents=*/false);
  print(arguments, {.loss = validation.loss,
                    .aux_loss = validation.hf_pooled,
                    .total_loss = validation.loss + (config.output_router_logits
                                                         ? config.router_aux_loss_coef * validation.hf_pooled
                                                         : 0.0),
                    .num_targets = validation.num_targets});
}

}  // namespace

void add_eval(CLI::App& app) {
  auto arguments = std::make_shared<EvalArguments>();
  CLI::App* verb = app.add_subcommand("eval", "Loss, logits and gradients of a model on given tokens");
  verb->add_option("--model", arguments->model,
                   "Hugging Face model directory (mixtral, olmoe, qwen3_moe) or checkpoint")
      ->required();
  verb->add_option("--input", arguments->input, "safetensors file with input_ids, int64 [B, S]");
  verb->add_option("--data", arguments->data, "prepared data folder: evaluates its validation documents");
  verb->add_option("--sequence-length", arguments->sequence_length, "with --data: tokens per sequence")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  verb->add_option("--max-sequences", arguments->max_sequences, "with --data: at most this many sequences")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  verb->add_option("--dtype", arguments->dtype, "float64, float32 or bfloat16")->capture_default_str();
  verb->add_option("--logits", arguments->logits_file, "write the logits [B, S, V] to this safetensors file");
  verb->add_option("--grads", arguments->grads_file,
                   "write the gradient of every parameter of the total loss, under its on-disk name");
  verb->add_flag("--json", arguments->json, "print one JSON object");
  verb->footer(
      "Examples:\n"
      "  collegium eval --model runs/demo/step-00000600 --data data/demo\n"
      "  collegium eval --model DIR --input ids.safetensors --dtype float64 --grads grads.safetensors "
      "--json");
  verb->callback([arguments] { run(*arguments); });
}

}  // namespace collegium::cli
