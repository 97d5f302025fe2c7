// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <memory>

#include "collegium/base/error.h"
#include "collegium/base/file.h"
#include "collegium/base/log.h"
#include "collegium/base/units.h"
#include "collegium/cli/launch.h"
#include "collegium/cli/load_model.h"
#include "collegium/cli/train_loop.h"
#include "collegium/cli/train_sample.h"
#include "collegium/cli/verb.h"
#include "collegium/data/dataset.h"
#include "collegium/model/account.h"
#include "collegium/model/tensor_io.h"
#include "collegium/parallel/rank_card.h"
#include "collegium/train/freeze.h"
#include "collegium/train/validation.h"

namespace collegium::cli {

namespace {

struct TrainArguments {
  std::string run_file;
  std::vector<std::string> overrides;
  TrainRequest request;
  LaunchOptions launch;
  bool dry_run = false;
  bool help_config = false;
  bool json = false;
};

void print_config_help() {
  fmt::print("# Keys of a run file\n\n| key | default | meaning |\n|---|---|---|\n");
  for (const FieldDoc& doc : train::document_run_config()) {
    fmt::print("| `{}` | {} | {} |\n", doc.path,
               doc.default_value.empty() ? "" : "`" + doc.default_value + "`", doc.doc);
  }
}

// The run as it would begin, checked as far as that goes without ranks and before data is prepared.
train::RunConfig checked_run(const train::RunConfig& config) {
  if (config.model.vocab_size > 0 && !path_exists(config.data.path)) {
    log_warning(fmt::format("data.path = {}: not there yet, so what depends on data was not checked",
                            config.data.path));
    model::validate(config.model, /*training=*/true);
    return config;
  }
  const data::Dataset dataset(config.data.path);
  const train::RunConfig resolved = train::with_tokens_of(dataset, config);
  const data::Sampler sampler(dataset, data::Split::kTrain, config.data.sequence_length, config.train.seed);
  train::require_validation(dataset, train::validation_shape(config), resolved.model.moe);
  const RunSample sample(config, dataset, resolved.model);
  return resolved;
}

void print_plan(const train::RunConfig& config, int num_ranks, bool json) {
  const train::RunConfig resolved = checked_run(config);
  train::find_frozen(resolved.model, resolved.model_source.freeze);
  const model::ParameterAccount a = model::count_parameters(resolved.model);
  const double flops = model::training_flops_per_token(resolved.model, resolved.data.sequence_length);
  const auto value_bytes =
      static_cast<std::int64_t>(c10::elementSize(model::parse_dtype(resolved.train.dtype, "train.dtype")));
  const std::vector<parallel::RankCard> cards = parallel::make_rank_cards(
      resolved.model, resolved.parallel, num_ranks, resolved.batch.micro_sequences, value_bytes);
  if (json) {
    const Json account = {{"total", a.total},   {"active", a.active},       {"experts", a.experts},
                          {"router", a.router}, {"embedding", a.embedding}, {"dense", a.dense}};
    Json ranks = Json::array();
    for (const parallel::RankCard& card : cards) ranks.push_back(write_fields(card));
    fmt::print("{}\n",
               Json{{"parameters", account}, {"training_flops_per_token", flops}, {"ranks", ranks}}.dump());
    return;
  }
  fmt::print("the run file is valid\n");
  if (const auto reason = model::not_of_family(resolved.model))
    fmt::print("checkpoints will be of collegium_moe, not of {}: {}\n", enum_name(resolved.model.family),
               *reason);
  fmt::print("parameters   {:>14} in all, {} active per token\n", a.total, a.active);
  fmt::print("  experts    {:>14}\n  router     {:>14}\n  embedding  {:>14}\n  the rest   {:>14}\n",
             a.experts, a.router, a.embedding, a.dense);
  fmt::print("training     {} FLOP per token\n\n", format_count(flops));
  fmt::print("{}", parallel::rank_cards_text(cards, resolved.model, resolved.parallel));
}

void run(const TrainArguments& arguments) {
  if (arguments.help_config) {
    print_config_help();
    return;
  }
  require_config(!arguments.run_file.empty(), "train: name a run file, such as configs/demo.toml");
  const train::RunConfig config = train::read_run_config(arguments.run_file, arguments.overrides);
  if (arguments.dry_run) {
    print_plan(config, num_ranks(arguments.launch), arguments.json);
    return;
  }
  TrainRequest request = arguments.request;
  if (!request.weights_only.empty()) {
    request.weights_only = find_model(request.weights_only);
    require_config(is_folder(request.weights_only), "--weights-only {}: there is no such folder",
                   request.weights_only);
  }
  require_folder_of(request.record_routing, "--record-routing");
  LaunchOptions options = arguments.launch;
  options.threads = config.train.threads;
  launch(options, [&](const std::shared_ptr<comm::Communicator>& world) {
    const TrainSummary summary = run_training(config, request, world);
    if (world->rank() != 0) return;
    if (arguments.json) {
      fmt::print("{}\n", summary_json(summary).dump());
    } else {
      print_summary(config, request, summary);
    }
  });
}

}  // namespace

void add_train(CLI::App& app) {
  auto arguments = std::make_shared<TrainArguments>();
  CLI::App* verb = app.add_subcommand(
      "train", "Train the model that a run file describes; continues from its last checkpoint");
  verb->add_option("run_file", arguments->run_file, "TOML run file (keys: --help-config)");
  verb->add_option("--set", arguments->overrides,
                   "KEY=VALUE replaces a key of the run file; repeat for more");
  CLI::Option* dry_run =
      verb->add_flag("--dry-run", arguments->dry_run,
                     "check the run file; print the parameter account and every rank's card");
  verb->add_flag("--fresh", arguments->request.fresh, "start over: removes the run folder's checkpoints")
      ->excludes(dry_run);
  verb->add_option("--weights-only", arguments->request.weights_only,
                   "start from the weights of this checkpoint, model folder or run, with a new optimizer")
      ->excludes(dry_run);
  verb->add_option("--record-routing", arguments->request.record_routing,
                   "write every token's experts to this file")
      ->excludes(dry_run);
  verb->add_option("--replay-routing", arguments->request.replay_routing,
                   "take every token's experts from this file")
      ->excludes(dry_run);
  add_launch_options(*verb, arguments->launch);
  verb->add_flag("--help-config", arguments->help_config, "list every key of a run file, as Markdown");
  verb->add_flag("--json", arguments->json, "print one JSON object at the end");
  verb->footer(
      "SIGINT and SIGTERM finish the step and write a checkpoint; the same command continues, without "
      "--fresh\n"
      "and --weights-only.\n"
      "Examples:\n"
      "  collegium train configs/demo.toml\n"
      "  collegium train configs/demo.toml --set train.steps=50 --set optimizer.learning_rate=2e-3\n"
      "  collegium train configs/demo.toml --ranks 2\n"
      "  mpirun -n 4 collegium train configs/demo.toml --set parallel.ep=2\n"
      "  collegium train configs/fine_grained.toml --dry-run --ranks 4");
  verb->callback([arguments] { run(*arguments); });
}

}  // namespace collegium::cli
