// SPDX-License-Identifier: Apache-2.0
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/nonzero.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros_like.h>
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <cmath>
#include <memory>
#include <numeric>

#include "collegium/base/error.h"
#include "collegium/base/file.h"
#include "collegium/cli/launch.h"
#include "collegium/cli/load_model.h"
#include "collegium/cli/verb.h"
#include "collegium/data/dataset.h"
#include "collegium/data/tokenizer.h"
#include "collegium/model/tensor_io.h"
#include "collegium/moe/balance.h"
#include "collegium/parallel/shares.h"
#include "collegium/train/validation.h"

namespace collegium::cli {

namespace {

struct EvalArguments {
  std::string model;
  std::string input;
  std::string text;
  std::string file;
  std::string data;
  bool any_tokenizer = false;
  bool mask_documents = false;
  std::int64_t sequence_length = 512;
  std::int64_t max_sequences = 64;
  std::string dtype = "float32";
  std::string logits_file;
  std::string grads_file;
  LaunchOptions launch;
  bool json = false;
};

// Where the tokens come from, for messages.
std::string given_tokens(const EvalArguments& arguments) {
  if (!arguments.input.empty()) return arguments.input;
  return arguments.file.empty() ? "--text" : arguments.file;
}

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

at::Tensor tokenize(const EvalArguments& arguments, std::int64_t vocab_size) {
  const data::Tokenizer tokenizer = data::Tokenizer::load(std::filesystem::path(arguments.model));
  const std::vector<std::int64_t> ids =
      tokenizer.encode(arguments.file.empty() ? arguments.text : read_file(arguments.file), /*add_bos=*/true);
  require_config(ids.size() >= 2, "eval: the text has {} tokens, needs at least two", ids.size());
  for (const std::int64_t id : ids)
    require_config(id < vocab_size, "token {}: must lie in [0, vocab_size = {})", id, vocab_size);
  return at::tensor(ids, at::kLong).unsqueeze(0);
}

// The rows of all ranks, in rank order, on the group's rank 0 (undefined on the others).
at::Tensor gather_rows(comm::Communicator& group, const at::Tensor& mine,
                       const std::vector<std::int64_t>& rows) {
  if (group.rank() > 0) {
    if (mine.size(0) > 0) group.send(mine.contiguous(), 0).wait();
    return {};
  }
  std::vector<std::int64_t> shape = mine.sizes().vec();
  shape[0] = std::accumulate(rows.begin(), rows.end(), std::int64_t{0});
  const at::Tensor all = at::empty(shape, mine.options());
  std::int64_t begin = rows[0];
  all.narrow(0, 0, begin).copy_(mine);
  for (int rank = 1; rank < group.size(); ++rank) {
    const std::int64_t count = rows[static_cast<std::size_t>(rank)];
    if (count > 0) group.recv(all.narrow(0, begin, count), rank).wait();
    begin += count;
  }
  return all;
}

// The gradient of every trained tensor under its on-disk name, on rank 0: an expert's is summed over the
// ranks that hold it, every other over all.
std::vector<std::pair<std::string, at::Tensor>> gather_gradients(const LoadedModel& loaded) {
  const at::NoGradGuard no_grad;
  const parallel::Groups& groups = loaded.groups;
  const model::Decoder& decoder = loaded.decoder;
  std::vector<std::int64_t> num_held;
  num_held.reserve(static_cast<std::size_t>(groups.ep->size()));
  for (int rank = 0; rank < groups.ep->size(); ++rank) num_held.push_back(groups.placement.count(rank));
  std::vector<at::Tensor> gradients;
  for (const model::Parameter& parameter : decoder.parameters()) {
    const bool expert = parameter.kind == model::ParameterKind::kExpert;
    at::Tensor& gradient = gradients.emplace_back();
    if (!parameter.trainable) continue;
    gradient = parameter.value.grad().defined() ? parameter.value.grad() : at::zeros_like(parameter.value);
    (expert ? groups.edp : groups.dp)->all_reduce(gradient).wait();
    if (expert && groups.place.edp == 0) gradient = gather_rows(*groups.ep, gradient, num_held);
  }
  std::vector<std::pair<std::string, at::Tensor>> named;
  if (!groups.is_root()) return named;
  const std::vector<model::Parameter> whole = model::list_parameters(decoder.config());
  for (const model::DiskTensor& disk : model::list_disk_tensors(decoder.config(), whole)) {
    const at::Tensor& gradient = gradients[disk.parameter];
    if (gradient.defined()) named.emplace_back(disk.name, model::disk_view(disk, gradient));
  }
  return named;
}

struct EvalResult {
  double loss = 0.0;
  double aux_loss = 0.0;
  double total_loss = 0.0;
  std::int64_t num_targets = 0;
};

// Weights are finite, or they would not have been loaded.
void require_finite(const EvalArguments& arguments, const EvalResult& result) {
  if (std::isfinite(result.total_loss)) return;
  throw Error(fmt::format("eval: the loss is {}: an activation exceeds what {} can hold",
                          std::isnan(result.total_loss) ? "nan" : "infinite", arguments.dtype));
}

// What all ranks' sequences add up to.
struct RankSums {
  double loss = 0.0;
  std::vector<moe::RouterTotals> layers;
};

RankSums sum_losses(comm::Communicator& dp, const at::Tensor& loss, const model::ForwardResult& forward) {
  const at::NoGradGuard no_grad;
  RankSums sums;
  std::vector<at::Tensor> parts = {loss.to(at::kDouble).view({1})};
  for (const auto& layer : forward.layers) {
    sums.layers.emplace_back(layer->statistics);
    parts.push_back(sums.layers.back().values());
  }
  const at::Tensor all = at::cat(parts);
  dp.all_reduce(all).wait();
  sums.loss = all[0].item<double>();
  std::int64_t begin = 1;
  for (moe::RouterTotals& totals : sums.layers) {
    const std::int64_t size = totals.values().numel();
    totals.values().copy_(all.narrow(0, begin, size));
    begin += size;
  }
  return sums;
}

// Of all sequences, written by rank 0.
void write_logits(const EvalArguments& arguments, const LoadedModel& loaded, const at::Tensor& hidden_BSD,
                  const std::vector<std::int64_t>& rows) {
  const at::NoGradGuard no_grad;
  comm::Communicator& dp = *loaded.groups.dp;
  const at::Tensor logits = gather_rows(dp, loaded.decoder.logits(hidden_BSD), rows);
  if (dp.rank() == 0) model::write_tensors(arguments.logits_file, {{"logits", logits}});
}

// Every rank takes its share of the sequences, perhaps none, and takes part in everything.
EvalResult evaluate_ids(const EvalArguments& arguments, const LoadedModel& loaded,
                        const at::Tensor& all_ids_BS) {
  const model::Decoder& decoder = loaded.decoder;
  const model::ModelConfig& config = decoder.config();
  comm::Communicator& dp = *loaded.groups.dp;
  const comm::WhereScope scope(dp.where(), {.step = -1, .layer = -1, .phase = "evaluation"});
  const std::int64_t unit = moe::indivisible_sequences(config.moe, /*training=*/false);
  const parallel::Share share = parallel::share_of(all_ids_BS.size(0), unit, dp.size(), dp.rank());
  const at::Tensor ids_BS = all_ids_BS.narrow(0, share.first, share.count);

  const bool want_gradients = !arguments.grads_file.empty();
  const at::AutoGradMode mode(want_gradients);
  model::ForwardOptions options;
  options.context.first_sequence = share.first;
  const model::ForwardResult forward = decoder.forward(ids_BS, options);
  const std::int64_t length = ids_BS.size(1) - 1;
  const at::Tensor sum =
      model::cross_entropy_sum(decoder, forward.hidden_BSD.narrow(1, 0, length), ids_BS.narrow(1, 1, length));
  const RankSums sums = sum_losses(dp, sum, forward);
  EvalResult result;
  result.num_targets = all_ids_BS.size(0) * length;
  result.loss = sums.loss / static_cast<double>(result.num_targets);

  std::vector<moe::RouterStatisticsGradient> gradients(sums.layers.size());
  const double coefficient = config.output_router_logits ? config.router_aux_loss_coef : 0.0;
  const at::ScalarType router_dtype = decoder.dtype() == at::kDouble ? at::kDouble : at::kFloat;
  result.aux_loss = moe::hf_pooled_loss(config.moe, sums.layers, coefficient, gradients, router_dtype);
  result.total_loss = result.loss + coefficient * result.aux_loss;
  require_finite(arguments, result);
  if (!arguments.logits_file.empty()) {
    write_logits(arguments, loaded, forward.hidden_BSD,
                 parallel::share_rows(all_ids_BS.size(0), unit, dp.size(), 1));
  }
  if (want_gradients) {
    for (std::size_t i = 0; i < gradients.size(); ++i) forward.layers[i]->statistics_gradient = gradients[i];
    (sum / static_cast<double>(result.num_targets)).backward();
    const auto named = gather_gradients(loaded);
    if (dp.rank() == 0) model::write_tensors(arguments.grads_file, named);
  }
  return result;
}

void require_positions(std::int64_t length, const model::ModelConfig& config) {
  require_config(length <= config.max_positions,
                 "eval: sequences of {} tokens: more than the model's "
                 "max_positions = {}",
                 length, config.max_positions);
}

void require_whole_groups(const EvalArguments& arguments, std::int64_t sequences,
                          const model::ModelConfig& config) {
  const std::int64_t unit = moe::indivisible_sequences(config.moe, /*training=*/false);
  require_config(sequences % unit == 0,
                 "{}: {} sequences, must be a multiple of model.moe.capacity.group_sequences = {}",
                 given_tokens(arguments), sequences, unit);
}

data::Dataset open_data(const EvalArguments& arguments, const model::ModelConfig& config) {
  require_positions(arguments.sequence_length, config);
  data::Dataset dataset(arguments.data);
  train::check_vocabulary(dataset, config);
  if (!arguments.any_tokenizer) data::require_same_tokenizer(dataset, arguments.model, "--any-tokenizer");
  return dataset;
}

EvalResult evaluate_data(const EvalArguments& arguments, const data::Dataset& dataset,
                         const LoadedModel& loaded) {
  const model::ModelConfig& config = loaded.decoder.config();
  const train::ValidationShape shape{.sequence_length = arguments.sequence_length,
                                     .max_sequences = arguments.max_sequences,
                                     .mask_documents = arguments.mask_documents};
  const train::ValidationResult validation =
      train::validate_model(loaded.decoder, dataset, shape, loaded.groups);
  const double coefficient = config.output_router_logits ? config.router_aux_loss_coef : 0.0;
  const EvalResult result{.loss = validation.loss,
                          .aux_loss = validation.hf_pooled,
                          .total_loss = validation.loss + coefficient * validation.hf_pooled,
                          .num_targets = validation.num_targets};
  require_finite(arguments, result);
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

// However a file is spelt.
std::filesystem::path place_of(const std::string& file) {
  std::error_code unknown;
  return std::filesystem::weakly_canonical(std::filesystem::absolute(file), unknown);
}

void run(const EvalArguments& arguments) {
  require_config(arguments.sequence_length >= 2, "--sequence-length {}: must be at least 2",
                 arguments.sequence_length);
  require_config(arguments.max_sequences >= 1, "--max-sequences {}: must be at least 1",
                 arguments.max_sequences);
  int given = 0;
  for (const std::string* way : {&arguments.input, &arguments.text, &arguments.file, &arguments.data})
    given += way->empty() ? 0 : 1;
  require_config(given == 1, "eval: give either --input or --data, or a text by --text or --file");
  require_config(arguments.data.empty() || (arguments.logits_file.empty() && arguments.grads_file.empty()),
                 "eval: --logits and --grads need --input, --text or --file");
  require_config(arguments.logits_file.empty() || arguments.grads_file.empty() ||
                     place_of(arguments.logits_file) != place_of(arguments.grads_file),
                 "eval: --logits {} and --grads {} are the same file", arguments.logits_file,
                 arguments.grads_file);
  const at::ScalarType dtype = model::parse_dtype(arguments.dtype, "--dtype");
  const model::ModelConfig config = model::read_model_config(arguments.model);
  model::validate(config, /*training=*/false);
  at::Tensor ids_BS;
  if (!arguments.input.empty()) ids_BS = read_input_ids(arguments.input, config.vocab_size);
  if (!arguments.text.empty() || !arguments.file.empty()) ids_BS = tokenize(arguments, config.vocab_size);
  if (ids_BS.defined()) {
    require_positions(ids_BS.size(1), config);
    require_whole_groups(arguments, ids_BS.size(0), config);
  }
  std::optional<data::Dataset> dataset;
  if (!arguments.data.empty()) dataset.emplace(open_data(arguments, config));
  launch(arguments.launch, [&](const std::shared_ptr<comm::Communicator>& world) {
    // Rank 0 writes, at the end.
    if (world->rank() == 0) {
      require_folder_of(arguments.logits_file, "--logits");
      require_folder_of(arguments.grads_file, "--grads");
    }
    const LoadedModel loaded = load_model(arguments.model, config, dtype, world);
    const EvalResult result =
        dataset ? evaluate_data(arguments, *dataset, loaded) : evaluate_ids(arguments, loaded, ids_BS);
    if (world->rank() == 0) print(arguments, result);
  });
}

}  // namespace

void add_eval(CLI::App& app) {
  auto arguments = std::make_shared<EvalArguments>();
  CLI::App* verb = app.add_subcommand("eval", "Loss, logits and gradients of a model on given tokens");
  verb->add_option("--model", arguments->model,
                   "Hugging Face model directory (mixtral, olmoe, qwen3_moe), checkpoint, or run folder (its "
                   "newest checkpoint)")
      ->required();
  verb->add_option("--input", arguments->input, "safetensors file with input_ids, int64 [B, S]");
  verb->add_option("--text", arguments->text, "text to evaluate, by the model's tokenizer.model");
  verb->add_option("--file", arguments->file, "file with the text");
  CLI::Option* data =
      verb->add_option("--data", arguments->data, "prepared data folder: evaluates its validation documents");
  verb->add_option("--sequence-length", arguments->sequence_length, "tokens per sequence")
      ->needs(data)
      ->capture_default_str();
  verb->add_option("--max-sequences", arguments->max_sequences, "at most this many sequences")
      ->needs(data)
      ->capture_default_str();
  verb->add_flag("--mask-documents", arguments->mask_documents,
                 "attention stays within a document, as with data.mask_documents in training")
      ->needs(data);
  verb->add_flag("--any-tokenizer", arguments->any_tokenizer,
                 "accept tokens that another tokenizer made than the model's")
      ->needs(data);
  verb->add_option("--dtype", arguments->dtype, "float64, float32 or bfloat16")->capture_default_str();
  verb->add_option("--logits", arguments->logits_file, "write the logits [B, S, V] to this safetensors file");
  verb->add_option("--grads", arguments->grads_file,
                   "write the gradient of every parameter of the total loss, under its on-disk name");
  verb->add_flag("--json", arguments->json, "print one JSON object");
  add_launch_options(*verb, arguments->launch);
  verb->footer(
      "Examples:\n"
      "  collegium eval --model runs/demo --data data/demo\n"
      "  collegium eval --model runs/demo --data data/demo --ranks 2\n"
      "  collegium eval --model runs/demo --text \"To be, or not to be\"\n"
      "  collegium eval --model DIR --input ids.safetensors --dtype float64 --grads grads.safetensors "
      "--json");
  verb->callback([arguments] {
    arguments->model = find_model(arguments->model);
    run(*arguments);
  });
}

}  // namespace collegium::cli
