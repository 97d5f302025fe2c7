// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <optional>

#include "collegium/base/error.h"
#include "collegium/base/file.h"
#include "collegium/cli/verb.h"
#include "collegium/plan/simulator.h"

namespace collegium::cli {

namespace {

struct SimulateArguments {
  std::string model = "mixtral-8x7b";
  std::string cluster = "h100-80";
  std::string layout;
  std::string precision = "bf16";
  std::string trace;
  std::string routing;
  double seq_len = 4096;
  std::optional<double> global_batch;
  double skew = 0.0;
  std::optional<std::uint64_t> seed;
  bool schedules = false;
  bool json = false;
};

struct Outcome {
  std::string schedule;
  plan::Simulation simulation;
};

Outcome run_one(const SimulateArguments& a, const plan::ModelSpec& model, plan::Layout layout) {
  const plan::Workload work{.seq_len = a.seq_len, .global_batch = *a.global_batch, .precision = a.precision};
  if (const auto reason = plan::forbidden(model, layout, work))
    throw ConfigError(fmt::format("--layout: {}", *reason));
  const plan::Cluster cluster = plan::load_cluster(a.cluster);
  plan::peak_flops(cluster.accelerator, work.precision);
  constexpr double kMostPasses = 4e6;
  const double passes = plan::num_micro_batches(layout, work) * layout.pp * layout.virtual_stages;
  require_config(passes <= kMostPasses,
                 "--layout: {:.0f} micro-batches x {} stages are more than {:.0f} passes",
                 plan::num_micro_batches(layout, work), layout.pp * layout.virtual_stages, kMostPasses);
  const plan::Pipeline pipeline{.schedule = layout.schedule,
                                .ranks = layout.pp,
                                .virtual_stages = layout.virtual_stages,
                                .micro_batches = static_cast<int>(plan::num_micro_batches(layout, work))};
  plan::RoutingSkew skew;
  skew.deviation = a.skew;
  skew.seed = a.seed.value_or(0);
  const char* uneven = a.routing.empty() ? "--skew" : "--routing";
  if (a.skew > 0.0 || !a.routing.empty()) {
    require_config(model.is_moe(), "{}: {} has no experts", uneven, model.name);
    require_config(layout.ep > 1, "{}: with ep = {} every rank has all experts, and none waits for another",
                   uneven, layout.ep);
  }
  if (!a.routing.empty()) {
    skew.recorded = std::make_shared<const plan::RoutingCounts>(plan::read_routing(a.routing));
  }
  const plan::Durations durations = plan::layout_durations(model, layout, work, cluster, plan::Stack{}, skew);
  return {enum_name(layout.schedule), plan::simulate(pipeline, durations)};
}

std::vector<Outcome> run_all(const SimulateArguments& a) {
  const plan::ModelSpec model = plan::load_model(a.model);
  plan::Layout layout = plan::parse_layout(a.layout);
  if (!a.schedules) return {run_one(a, model, layout)};
  std::vector<Outcome> all;
  const int virtual_stages = layout.virtual_stages;
  for (const auto& [name, schedule] : EnumNames<plan::Schedule>::names) {
    layout.schedule = schedule;
    layout.virtual_stages = schedule == plan::Schedule::kInterleaved ? std::max(2, virtual_stages) : 1;
    const plan::Workload work{
        .seq_len = a.seq_len, .global_batch = *a.global_batch, .precision = a.precision};
    if (const auto reason = plan::forbidden(model, layout, work)) {
      fmt::print(stderr, "{} left out: {}\n", name, *reason);
      continue;
    }
    all.push_back(run_one(a, model, layout));
  }
  return all;
}

Json outcome_json(const Outcome& o) {
  return {{"schedule", o.schedule},
          {"makespan_s", o.simulation.makespan_s},
          {"bubble_share", o.simulation.bubble_share()},
          {"busy_s", o.simulation.busy_s},
          {"peak_chunks", o.simulation.peak_chunks}};
}

void print(const Outcome& o) {
  const auto& peaks = o.simulation.peak_chunks;
  fmt::print(
      "{:<12} pipeline {:.4g} s, idle {:.1f} % of it; chunks held at most: {} (first stage), {} (last)\n",
      o.schedule, o.simulation.makespan_s, 100.0 * o.simulation.bubble_share(), peaks.front(), peaks.back());
  constexpr std::size_t kWidth = 100;
  constexpr std::size_t kMostStages = 32;
  if (peaks.size() <= kMostStages) fmt::print("{}", plan::timeline_picture(o.simulation, kWidth));
}

void run_simulate(const SimulateArguments& a) {
  require_config(a.global_batch.has_value(), "--global-batch is missing: sequences of an optimizer step");
  plan::check_workload(
      {.seq_len = a.seq_len, .global_batch = *a.global_batch, .precision = a.precision, .imbalance = 1.0},
      "--");
  require_config(a.skew == 0.0 || a.routing.empty(), "--skew and --routing: give one of them");
  require_config(std::isfinite(a.skew) && a.skew >= 0.0, "--skew = {}: must be finite and not negative",
                 a.skew);
  require_config(a.skew > 0.0 || !a.seed, "--seed = {} needs --skew: nothing else is random",
                 a.seed.value_or(0));
  require_folder_of(a.trace, "--trace");
  const std::vector<Outcome> all = run_all(a);
  require_config(!all.empty(), "--schedules: none of the schedules is possible with this layout");
  if (a.json) {
    Json list = Json::array();
    for (const Outcome& o : all) list.push_back(outcome_json(o));
    fmt::print("{}\n", list.dump());
  } else {
    fmt::print("{} on {}, {} sequences of {} positions, products in {}\n", a.model, a.cluster,
               *a.global_batch, a.seq_len, a.precision);
    for (const Outcome& o : all) print(o);
    fmt::print("digits: forward passes, letters: backward, +: weight gradients apart, dots: idle\n");
  }
  if (!a.trace.empty()) {
    write_file_atomically(a.trace, plan::trace_json(all.front().simulation));
    fmt::print(stderr, "wrote {} ({} passes): open it in Perfetto or chrome://tracing\n", a.trace,
               all.front().simulation.spans.size());
  }
}

}  // namespace

void add_simulate(CLI::App& app) {
  auto a = std::make_shared<SimulateArguments>();
  CLI::App* verb = app.add_subcommand("simulate", "The pipeline of one optimizer step, pass by pass");
  verb->add_option("--model", a->model, "a name of the catalogue, a config.json, or a folder that holds one")
      ->capture_default_str();
  verb->add_option("--cluster", a->cluster, "a name of the catalogue or a TOML file")->capture_default_str();
  verb->add_option("--layout", a->layout, "such as tp1.pp4.dp8.ep8.mb1.1f1b")->required();
  verb->add_option("--global-batch", a->global_batch, "sequences of an optimizer step");
  verb->add_option("--seq", a->seq_len, "positions of a sequence")->capture_default_str();
  verb->add_option("--precision", a->precision,
                   "of matrix products: bf16, fp16, fp8, mxfp8, nvfp4, fp32, tf32")
      ->capture_default_str();
  verb->add_option("--skew", a->skew,
                   "routing skew: popularity of an expert is exp(skew x normal); 0 = balanced");
  verb->add_option("--routing", a->routing,
                   "take the skew from a routing that `train --record-routing` wrote");
  verb->add_option("--seed", a->seed, "of the skew")
      ->check(CLI::Range(std::int64_t{0}, std::numeric_limits<std::int64_t>::max()));
  verb->add_option("--trace", a->trace, "write a Chrome/Perfetto trace to this file");
  verb->add_flag("--schedules", a->schedules, "compare all schedules");
  verb->add_flag("--json", a->json, "print JSON");
  verb->footer(
      "Examples:\n  collegium simulate --layout pp4.dp8.ep8 --global-batch 64 --trace out.json\n"
      "  collegium simulate --layout pp8.dp4 --global-batch 64 --schedules");
  verb->callback([a] { run_simulate(*a); });
}

}  // namespace collegium::cli
