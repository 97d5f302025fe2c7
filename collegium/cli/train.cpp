// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <memory>

#include "collegium/base/error.h"
#include "collegium/base/units.h"
#include "collegium/cli/train_loop.h"
#include "collegium/cli/verb.h"
#include "collegium/data/dataset.h"
#include "collegium/model/account.h"

namespace collegium::cli {

namespace {

struct TrainArguments {
  std::string run_file;
  std::vector<std::string> overrides;
  TrainRequest request;
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

void print_account(const train::RunConfig& config, bool json) {
  train::RunConfig resolved = config;
  if (resolved.model.vocab_size == 0)
    resolved.model.vocab_size = data::Dataset(config.data.path).index().vocab_size;
  model::validate(resolved.model, /*training=*/true);
  const model::ParameterAccount a = model::count_parameters(resolved.model);
  const double flops = model::training_flops_per_token(resolved.model, resolved.data.sequence_length);
  const bool low = resolved.train.dtype == "bfloat16";
  const double bytes_per_parameter =
      low ? 2.0 + 2.0 + 4.0 * 4.0 : (resolved.train.dtype == "float32" ? 4.0 : 8.0) * 5.0;
  const double bytes = static_cast<double>(a.total) * bytes_per_parameter;
  if (json) {
    const Json account = {{"total", a.total},   {"active", a.active},       {"experts", a.experts},
                          {"router", a.router}, {"embedding", a.embedding}, {"dense", a.dense}};
    fmt::print(
        "{}\n",
        Json{{"parameters", account}, {"training_flops_per_token", flops}, {"state_bytes", bytes}}.dump());
    return;
  }
  fmt::print("the run file is valid\n");
  fmt::print("parameters   {:>14} in all, {} active per token\n", a.total, a.active);
  fmt::print("  experts    {:>14}\n  router     {:>14}\n  embedding  {:>14}\n  the rest   {:>14}\n",
             a.experts, a.router, a.embedding, a.dense);
  fmt::print("training     {} FLOP per token\n", format_count(flops));
  fmt::print("memory       {} for weights, gradients, masters and moments (without activations)\n",
             format_bytes(bytes));
}

void run(const TrainArguments& arguments) {
  if (arguments.help_config) {
    print_config_help();
    return;
  }
  require_config(!arguments.run_file.empty(), "train: name a run file, such as configs/demo.toml");
  const train::RunConfig config = train::read_run_config(arguments.run_file, arguments.overrides);
  if (arguments.dry_run) {
    print_account(config, arguments.json);
    return;
  }
  const TrainSummary summary = run_training(config, arguments.request);
  if (arguments.json) {
    fmt::print("{}\n", summary_json(summary).dump());
  } else {
    print_summary(config, summary);
  }
}

}  // namespace

void add_train(CLI::App& app) {
  auto arguments = std::make_shared<TrainArguments>();
  CLI::App* verb = app.add_subcommand(
      "train", "Train the model that a run file describes; continues from its last checkpoint");
  verb->add_option("run_file", arguments->run_file, "TOML run file (keys: --help-config)");
  verb->add_option("--set", arguments->overrides,
                   "KEY=VALUE replaces a key of the run file; repeat for more");
  verb->add_flag("--fresh", arguments->request.fresh, "start over: removes the run folder's checkpoints");
  verb->add_option("--weights-only", arguments->request.weights_only,
                   "start from the weights of this checkpoint, with a new optimizer");
  verb->add_option("--record-routing", arguments->request.record_routing,
                   "write every token's experts to this file");
  verb->add_option("--replay-routing", arguments->request.replay_routing,
                   "take every token's experts from this file");
  verb->add_flag("--dry-run", arguments->dry_run, "check the run file and print the parameter account");
  verb->add_flag("--help-config", arguments->help_config, "list every key of a run file, as Markdown");
  verb->add_flag("--json", arguments->json, "print one JSON object at the end");
  verb->footer(
      "SIGINT and SIGTERM finish the step and write a checkpoint; the same command continues.\n"
      "Examples:\n"
      "  collegium train configs/demo.toml\n"
      "  collegium train configs/demo.toml --set train.steps=50 --set optimizer.learning_rate=2e-3\n"
      "  collegium train configs/fine_grained.toml --dry-run");
  verb->callback([arguments] { run(*arguments); });
}

}  // namespace collegium::cli
