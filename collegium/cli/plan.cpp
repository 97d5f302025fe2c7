// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <array>
#include <iterator>
#include <memory>
#include <optional>

#include "collegium/base/error.h"
#include "collegium/base/file.h"
#include "collegium/cli/verb.h"
#include "collegium/plan/account.h"
#include "collegium/plan/cluster.h"
#include "collegium/plan/compare.h"
#include "collegium/plan/data_parallel.h"
#include "collegium/plan/search.h"
#include "collegium/plan/traffic.h"
#include "collegium/plan/validate.h"

namespace collegium::cli {

namespace {

struct PlanArguments {
  std::string model;
  std::string validate;
  std::string cluster = "h100-80";
  std::string precision = "bf16";
  std::string layout;
  double seq_len = 4096;
  std::optional<double> global_batch;
  double imbalance = 1.0;
  int gpus = 0;
  std::size_t top = 20;
  bool all_schedules = false;
  bool compare = false;
  bool data_parallel = false;
  bool shares = false;
  bool list = false;
  bool rows = false;
  bool json = false;
};

void print_list(bool json) {
  if (json) {
    fmt::print("{}\n", Json({{"models", plan::model_names()}, {"clusters", plan::cluster_names()}}).dump());
    return;
  }
  fmt::print("models    {}\nclusters  {}\n", fmt::join(plan::model_names(), ", "),
             fmt::join(plan::cluster_names(), ", "));
}

// Modes, of which a command has one, and what goes with which: an option that would be ignored is refused.
constexpr std::array kModes = {"--model", "--compare", "--shares", "--validate", "--list"};
constexpr std::array kExclusive = {std::pair{"--gpus", "--explain"}, std::pair{"--data-parallel", "--top"},
                                   std::pair{"--data-parallel", "--all-schedules"}};

void check_combination(const CLI::App& verb) {
  const std::pair<const char*, std::vector<std::string>> needs[] = {
      {"--gpus", {"--model"}},
      {"--explain", {"--model"}},
      {"--data-parallel", {"--gpus", "--explain"}},
      {"--global-batch", {"--gpus", "--explain"}},
      {"--precision", {"--gpus", "--explain"}},
      {"--imbalance", {"--gpus", "--explain"}},
      {"--cluster", {"--gpus", "--explain", "--shares"}},
      {"--seq", {"--model", "--shares"}},
      {"--top", {"--gpus"}},
      {"--all-schedules", {"--gpus"}},
      {"--rows", {"--validate"}}};
  const auto given = [&](const std::string& option) { return verb.count(option) > 0; };
  std::vector<std::string> modes;
  std::copy_if(kModes.begin(), kModes.end(), std::back_inserter(modes), given);
  require_config(!modes.empty(), "plan: give one of {}", fmt::join(kModes, ", "));
  require_config(modes.size() == 1, "plan: {} exclude each other", fmt::join(modes, " and "));
  for (const auto& [option, needed] : needs) {
    require_config(!given(option) || std::any_of(needed.begin(), needed.end(), given), "plan: {} needs {}",
                   option, fmt::join(needed, " or "));
  }
  for (const auto& [one, other] : kExclusive)
    require_config(!given(one) || !given(other), "plan: {} and {} exclude each other", one, other);
}

plan::Workload workload(const PlanArguments& a) {
  require_config(a.global_batch.has_value(), "--global-batch is missing: sequences of an optimizer step");
  plan::Workload work{.seq_len = a.seq_len,
                      .global_batch = *a.global_batch,
                      .precision = a.precision,
                      .imbalance = a.imbalance};
  plan::check_workload(work, "--");
  return work;
}

void run_search(const PlanArguments& a, const plan::ModelSpec& model) {
  const plan::Cluster cluster = plan::load_cluster(a.cluster);
  const plan::Workload work = workload(a);
  const plan::Stack stack;
  plan::SearchOptions options;
  options.accelerators = a.gpus;
  options.vary_schedule = a.all_schedules;
  options.keep = a.top;
  const plan::SearchResult found = plan::search(model, work, cluster, stack, options);
  if (a.json) {
    fmt::print("{}\n", plan::search_json(found, model, work, a.top).dump());
    return;
  }
  fmt::print("{}", plan::format_search(found, model, work, cluster, a.top));
  if (found.ranked.empty()) return;
  const plan::Candidate& best = found.ranked.front();
  fmt::print("\nThe fastest, {}\n{}{}Assumptions\n", plan::layout_name(best.layout),
             plan::format_step(best.time), plan::format_memory(best.memory, cluster));
  for (const std::string& line : plan::memory_assumptions(best.layout, work, stack))
    fmt::print("  {}\n", line);
}

plan::Layout given_layout(const PlanArguments& a, const plan::ModelSpec& model, const plan::Workload& work) {
  const bool by_count = a.gpus > 0;
  const std::string text = by_count ? fmt::format("dp{}", a.gpus) : a.layout;
  plan::Layout layout = plan::parse_layout(text);
  layout.sequence_parallel = layout.tp > 1;
  if (const auto reason = plan::forbidden(model, layout, work))
    throw ConfigError(fmt::format("{} {}: {}", by_count ? "--gpus" : "--explain",
                                  by_count ? std::to_string(a.gpus) : a.layout, *reason));
  return layout;
}

void compare_data_parallel(const PlanArguments& a, const plan::ModelSpec& model) {
  const plan::Cluster cluster = plan::load_cluster(a.cluster);
  const plan::Workload work = workload(a);
  const plan::Layout layout = given_layout(a, model, work);
  const auto variants = plan::data_parallel_variants(model, layout, work, cluster, plan::Stack{});
  fmt::print("{}", a.json ? plan::data_parallel_json(variants).dump() + "\n"
                          : plan::format_data_parallel(variants, layout, cluster));
}

void explain(const PlanArguments& a, const plan::ModelSpec& model) {
  const plan::Cluster cluster = plan::load_cluster(a.cluster);
  const plan::Workload work = workload(a);
  const plan::Stack stack;
  const plan::Layout layout = given_layout(a, model, work);
  const plan::StepTime time = plan::step_time(model, layout, work, cluster, stack);
  const plan::MemoryReport memory = plan::worst_memory(model, layout, work, cluster, stack);
  if (a.json) {
    Json lines = Json::array();
    for (const plan::TrafficLine& t : plan::step_traffic(model, layout, work, cluster, stack))
      lines.push_back({{"operation", t.operation},
                       {"axes", t.axes},
                       {"ranks", t.ranks},
                       {"slow_link", t.slow_link},
                       {"bytes_per_use", t.bytes_per_use},
                       {"uses", t.uses},
                       {"what", t.purpose}});
    Json components = Json::object();
    for (const plan::MemoryLine& line : memory.lines) components[line.component] = line.bytes;
    fmt::print("{}\n", Json({{"layout", plan::layout_name(layout)},
                             {"step_s", time.step_s},
                             {"expert_comm_share", time.expert_comm_share()},
                             {"stage", memory.stage},
                             {"memory", components},
                             {"device_bytes", memory.device_bytes},
                             {"fits", plan::fits(memory, cluster)},
                             {"traffic", lines}})
                           .dump());
    return;
  }
  fmt::print("{}{}{}Assumptions\n", plan::explain_layout(model, layout, work, cluster, stack),
             plan::format_step(time), plan::format_memory(memory, cluster));
  for (const std::string& line : plan::memory_assumptions(layout, work, stack)) fmt::print("  {}\n", line);
}

void run_plan(const PlanArguments& a, const CLI::App& verb) {
  check_combination(verb);
  plan::check_workload({.seq_len = a.seq_len, .imbalance = a.imbalance}, "--");
  if (a.list) return print_list(a.json);
  if (verb.count("--validate") > 0) {
    const plan::Validation found = plan::validate_path(a.validate);
    fmt::print("{}",
               a.json ? plan::validation_json(found).dump() + "\n" : plan::format_validation(found, a.rows));
    return;
  }
  if (a.shares) {
    const plan::Cluster cluster = plan::load_cluster(a.cluster);
    fmt::print("{}", a.json ? plan::exchange_shares_json(cluster, a.seq_len).dump() + "\n"
                            : plan::format_exchange_shares(cluster, a.seq_len));
    return;
  }
  if (a.compare) {
    const auto all = plan::compare_classics();
    fmt::print("{}", a.json ? plan::comparison_json(all).dump() + "\n" : plan::format_comparison(all));
    return;
  }
  const plan::ModelSpec model = plan::load_model(a.model);
  if (a.data_parallel) return compare_data_parallel(a, model);
  if (verb.count("--explain") > 0) return explain(a, model);
  if (a.gpus > 0) return run_search(a, model);
  const plan::Account counts = plan::account(model);
  fmt::print("{}", a.json ? plan::account_json(model, counts, a.seq_len).dump() + "\n"
                          : plan::format_account(model, counts, a.seq_len));
}

}  // namespace

void add_plan(CLI::App& app) {
  auto arguments = std::make_shared<PlanArguments>();
  CLI::App* verb =
      app.add_subcommand("plan", "What fits, how fast, and why: parameters, memory, traffic, layouts");
  verb->add_option("--model", arguments->model,
                   "a name of the catalogue, a config.json, or a folder that holds one");
  verb->add_option("--seq", arguments->seq_len, "positions of a sequence")->capture_default_str();
  verb->add_option("--cluster", arguments->cluster, "a name of the catalogue or a TOML file")
      ->capture_default_str();
  verb->add_option("--gpus", arguments->gpus, "search the layouts of this many accelerators")
      ->check(CLI::Range(1, plan::kMostAccelerators));
  verb->add_option("--global-batch", arguments->global_batch, "sequences of an optimizer step");
  verb->add_option("--precision", arguments->precision,
                   "of matrix products: bf16, fp16, fp8, mxfp8, nvfp4, fp32, tf32")
      ->capture_default_str();
  verb->add_option("--imbalance", arguments->imbalance,
                   "tokens of the fullest rank over the mean (1 = balanced)")
      ->capture_default_str();
  verb->add_option("--top", arguments->top, "rows of the ranking")
      ->check(CLI::Range(1, 1000000))
      ->capture_default_str();
  verb->add_flag("--all-schedules", arguments->all_schedules, "zero-bubble and DualPipe too");
  verb->add_option("--explain", arguments->layout,
                   "draw a layout such as tp2.pp4.dp8.ep8.mb1: ranks, groups, traffic, memory, time");
  verb->add_flag(
      "--data-parallel", arguments->data_parallel,
      "parameter server, all-reduce and ZeRO 1 to 3 beside each other, of --gpus or of --explain LAYOUT");
  verb->add_flag("--shares", arguments->shares,
                 "the expert exchange's share on 2 and 32 ranks, and its remedies");
  verb->add_flag("--compare", arguments->compare, "classical published layouts beside the planner's choice");
  verb->add_option("--validate", arguments->validate,
                   "judge the planner on published runs: a CSV, or a folder of runs.csv files");
  verb->add_flag("--rows", arguments->rows, "list every row");
  verb->add_flag("--list", arguments->list, "names of the catalogue's models and clusters");
  verb->add_flag("--json", arguments->json, "print one JSON object");
  verb->footer(
      "Examples:\n  collegium plan --model mixtral-8x7b\n  collegium plan --model deepseek-v3 --cluster "
      "h100-80 --gpus 1024 --global-batch 4096 --seq 4096\n"
      "  collegium plan --model llama3-8b --gpus 64 --global-batch 256 --data-parallel\n"
      "  collegium plan --validate validation --rows");
  verb->callback([arguments, verb] { run_plan(*arguments, *verb); });
}

}  // namespace collegium::cli
