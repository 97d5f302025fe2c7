// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <memory>

#include "collegium/base/error.h"
#include "collegium/base/file.h"
#include "collegium/cli/verb.h"
#include "collegium/plan/account.h"
#include "collegium/plan/cluster.h"
#include "collegium/plan/validate.h"

namespace collegium::cli {

namespace {

struct PlanArguments {
  std::string model;
  std::string validate;
  double seq_len = 4096;
  bool list = false;
  bool rows = false;
  bool json = false;
};

void print_list(bool json) {
  if (json) {
    fmt::print("{}\n", Json({{"models", plan::model_names()}, {"clusters", plan::cluster_names()}}).dump());
    return;
  }
  fmt::print("models    {}\nclusters  {}\n", fmt::join(plan::model_names(), ", "), fmt::join(plan::cluster_names(), ", "));
}

void run_plan(const PlanArguments& a) {
  if (a.list) return print_list(a.json);
  if (!a.validate.empty()) {
    const plan::Validation found = plan::validate(read_file(a.validate), a.validate);
    fmt::print("{}", a.json ? plan::validation_json(found).dump() + "\n" : plan::format_validation(found, a.rows));
    return;
  }
  require_config(!a.model.empty(), "plan: give --model, --validate or --list");
  const plan::ModelSpec model = plan::load_model(a.model);
  const plan::Account counts = plan::account(model);
  fmt::print("{}", a.json ? plan::account_json(model, counts, a.seq_len).dump() + "\n"
                          : plan::format_account(model, counts, a.seq_len));
}

}  // namespace

void add_plan(CLI::App& app) {
  auto arguments = std::make_shared<PlanArguments>();
  CLI::App* verb = app.add_subcommand("plan", "What fits, how fast, and why: parameters, memory, traffic, layouts");
  verb->add_option("--model", arguments->model, "a name of the catalogue, a config.json, or a folder that holds one");
  verb->add_option("--seq", arguments->seq_len, "positions of a sequence")->check(CLI::PositiveNumber);
  verb->add_option("--validate", arguments->validate, "judge the planner on published runs (CSV)");
  verb->add_flag("--rows", arguments->rows, "with --validate: list every row");
  verb->add_flag("--list", arguments->list, "names of the catalogue's models and clusters");
  verb->add_flag("--json", arguments->json, "print one JSON object");
  verb->footer("Examples:\n  collegium plan --model mixtral-8x7b\n  collegium plan --validate published_runs.csv");
  verb->callback([arguments] { run_plan(*arguments); });
}

}  // namespace collegium::cli
