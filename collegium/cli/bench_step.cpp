// SPDX-License-Identifier: Apache-2.0
#include "collegium/cli/bench_step.h"

#include <ATen/Parallel.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <CLI/CLI.hpp>

#include "collegium/base/error.h"
#include "collegium/base/units.h"
#include "collegium/cli/bench.h"
#include "collegium/cli/signals.h"
#include "collegium/data/dataset.h"
#include "collegium/model/tensor_io.h"

namespace collegium::cli {

namespace {

constexpr const char* kModelGroup = "Model";

train::RunConfig config_of_flags(const StepBenchOptions& o) {
  train::RunConfig c;
  c.data.sequence_length = o.length;
  c.batch = {.global_batch = o.sequences, .micro_sequences = o.micro > 0 ? o.micro : o.sequences};
  c.train.dtype = o.dtype;
  c.train.recompute = o.recompute;
  c.model.family = model::Family::kCollegium;
  c.model.vocab_size = o.vocab;
  c.model.hidden_size = o.hidden;
  c.model.num_layers = o.layers;
  c.model.num_heads = o.heads;
  c.model.max_positions = o.length;
  c.model.moe.num_experts = o.experts;
  c.model.moe.top_k = o.top_k;
  c.model.moe.ffn_size = o.ffn;
  constexpr double kBalance = 0.01;
  c.model.moe.balance.load_balance = kBalance;
  if (o.top_k == 1) c.model.moe.router.renormalize = moe::Renormalize::kNever;
  model::complete(c.model);
  return c;
}

// Without what only a choice by score would use.
void force_balance(moe::RouterOptions& router) {
  router.selection = moe::Selection::kForcedBalance;
  router.bias_balancing = false;
  router.num_groups = router.top_groups = 1;
  if (router.noise == moe::Noise::kGumbel) router.noise = moe::Noise::kNone;
}

}  // namespace

train::RunConfig step_bench_config(const StepBenchOptions& o) {
  train::RunConfig c =
      o.run_file.empty() ? config_of_flags(o) : train::read_run_config(o.run_file, o.overrides);
  if (c.model.vocab_size == 0) c.model.vocab_size = data::Dataset(c.data.path).index().vocab_size;
  require_config(o.routing == "forced" || o.routing == "learned", "--routing {}: must be forced or learned",
                 o.routing);
  if (o.routing == "forced") force_balance(c.model.moe.router);
  const at::ScalarType dtype = model::parse_dtype(c.train.dtype, "--dtype");
  model::validate(c.model, /*training=*/true);
  train::validate_batch(c);
  apply_layout(o.layout, dtype, c.parallel);
  parallel::validate(c.parallel);
  c.run_folder.clear();
  c.model_source.init.clear();
  return c;
}

namespace {

void validate(const StepBenchOptions& o) {
  const auto at_least_one = [](const char* flag, std::int64_t value) {
    require_config(value >= 1, "{} {}: must be at least 1", flag, value);
  };
  at_least_one("--layers", o.layers);
  at_least_one("--hidden", o.hidden);
  at_least_one("--ffn", o.ffn);
  at_least_one("--experts", o.experts);
  at_least_one("--top-k", o.top_k);
  at_least_one("--heads", o.heads);
  at_least_one("--vocab", o.vocab);
  at_least_one("--sequences", o.sequences);
  at_least_one("--length", o.length);
  require_config(o.micro >= 0, "--micro {}: must not be negative (0 = all sequences at once)", o.micro);
  require_config(o.micro <= o.sequences, "--micro {}: must not exceed --sequences = {}", o.micro,
                 o.sequences);
  require_config(o.seconds > 0.0, "--seconds {}: must be positive", o.seconds);
  require_config(!o.run_file.empty() || o.overrides.empty(), "--set: needs a run file");
}

// A run file describes the model and the batch: flags beside it would say the same again, or otherwise.
void refuse_model_flags(const CLI::App& verb, const std::string& run_file) {
  for (const CLI::Option* option : verb.get_options()) {
    require_config(option->get_group() != kModelGroup || option->empty(),
                   "{} {}: cannot be given beside the run file {}, which describes the model and the batch; "
                   "change its keys with --set KEY=VALUE",
                   option->get_name(), fmt::join(option->results(), " "), run_file);
  }
}

Json phases_json(const StepBenchResult& r) {
  Json phases = Json::object();
  for (const PhaseSums& phase : r.phases) {
    phases[phase.name] = {{"within_nodes_bytes", phase.within_nodes},
                          {"between_nodes_bytes", phase.between_nodes},
                          {"transfer_seconds", phase.transfer_s},
                          {"skew_seconds", phase.skew_s},
                          {"waiting_seconds", phase.waiting_s}};
  }
  return phases;
}

Json result_json(const train::RunConfig& c, const StepBenchResult& r) {
  return {{"layers", c.model.num_layers},
          {"hidden", c.model.hidden_size},
          {"ffn", c.model.moe.ffn_size},
          {"experts", c.model.moe.num_experts},
          {"top_k", c.model.moe.top_k},
          {"vocab", c.model.vocab_size},
          {"sequences", c.batch.global_batch},
          {"length", c.data.sequence_length},
          {"dtype", c.train.dtype},
          {"parameters", r.parameters},
          {"dispatcher", enum_name(r.dispatcher.kind)},
          {"chunks", c.parallel.overlap.chunks},
          {"overlap", c.parallel.overlap.weight_gradients},
          {"ranks", r.ranks},
          {"ep", r.ep},
          {"threads_per_rank", r.threads_per_rank},
          {"runs", r.runs},
          {"seconds_min", r.seconds.min},
          {"seconds_median", r.seconds.median},
          {"seconds_max", r.seconds.max},
          {"tokens_per_s", r.tokens / r.seconds.median},
          {"gflops", r.flops / r.seconds.median / 1e9},
          {"gemm_peak_gflops", r.gemm_peak_flops_per_s / 1e9},
          {"fraction_of_gemm_peak", r.flops / r.seconds.median / r.gemm_peak_flops_per_s},
          {"bytes_within_nodes", r.bytes_within_nodes},
          {"bytes_between_nodes", r.bytes_between_nodes},
          {"all_to_all_seconds", r.all_to_all_s},
          {"all_to_all_exposed_seconds", r.all_to_all_exposed_s},
          {"all_to_all_share", r.all_to_all_s / r.mean_seconds},
          {"all_to_all_exposed_share", r.all_to_all_exposed_s / r.mean_seconds},
          {"hidden_share", r.hidden_share},
          {"phases", phases_json(r)},
          {"peak_rss_bytes", r.peak_rss_bytes},
          {"counted_bytes_of_rank", r.memory.total()},
          {"activation_bytes_per_token_and_layer",
           {{"counted", r.activations_counted},
            {"measured", r.activations_measured ? Json(*r.activations_measured) : Json()},
            {"recomputed", r.activations_recomputed}}}};
}

void print_phases(const StepBenchResult& r) {
  fmt::print("{:<20} {:>13} {:>14} {:>10} {:>12} {:>10}\n", "phase, per rank", "within nodes",
             "between nodes", "transfer", "late ranks", "waiting");
  const auto ranks = static_cast<double>(r.ranks);
  for (const PhaseSums& phase : r.phases) {
    fmt::print("  {:<18} {:>13} {:>14} {:>10} {:>12} {:>10}\n", phase.name,
               format_bytes(phase.within_nodes / ranks), format_bytes(phase.between_nodes / ranks),
               format_seconds(phase.transfer_s), format_seconds(phase.skew_s),
               format_seconds(phase.waiting_s));
  }
}

void print_memory(const train::RunConfig& c, const StepBenchResult& r) {
  fmt::print("activations    {} per token and layer counted, {} measured, {} if blocks are recomputed{}\n",
             format_bytes(r.activations_counted),
             r.activations_measured ? format_bytes(*r.activations_measured) : "too little",
             format_bytes(r.activations_recomputed), c.train.recompute ? " (they are)" : "");
  const StepMemory& m = r.memory;
  fmt::print("memory         {} at the peak, all ranks", format_bytes(r.peak_rss_bytes));
  if (r.ranks == 1) fmt::print(", {} of what is counted", format_percent(r.peak_rss_bytes / m.total()));
  fmt::print(
      "\n               counted of a rank: program and libraries {} (measured), weights, gradients and "
      "optimizer {}, activations {}, "
      "while it runs {}\n"
      "               tensors: {} counted, {} in use at the peak, {} with fragmentation\n",
      format_bytes(m.program), format_bytes(m.tensors.weights + m.tensors.gradients + m.tensors.optimizer),
      format_bytes(m.tensors.activations), format_bytes(m.tensors.transient), format_bytes(m.tensors.total()),
      format_bytes(m.tensors_peak), format_bytes(m.tensors_touched));
}

void print_result(const train::RunConfig& c, const StepBenchResult& r) {
  fmt::print(
      "model          {} parameters: {} layers x {}, {} experts of width {}, top {}, vocabulary {}, {}\n",
      format_count(static_cast<double>(r.parameters)), c.model.num_layers, c.model.hidden_size,
      c.model.moe.num_experts, c.model.moe.ffn_size, c.model.moe.top_k, c.model.vocab_size, c.train.dtype);
  fmt::print("ranks          {} of {} threads, ep = {}, dispatcher {}\n", r.ranks, r.threads_per_rank, r.ep,
             describe_layout(r.dispatcher, c.parallel.overlap));
  fmt::print("step           {} sequences x {} tokens: {} least, {} median, {} most of {} steps\n",
             c.batch.global_batch, c.data.sequence_length, format_seconds(r.seconds.min),
             format_seconds(r.seconds.median), format_seconds(r.seconds.max), r.runs);
  fmt::print("speed          {:.0f} tokens/s, {} useful, {} of the GEMM peak ({})\n",
             r.tokens / r.seconds.median, format_gflops(r.flops / r.seconds.median),
             format_percent(r.flops / r.seconds.median / r.gemm_peak_flops_per_s),
             format_gflops(r.gemm_peak_flops_per_s));
  print_memory(c, r);
  if (r.ranks == 1) return;
  fmt::print("bytes sent     {} within nodes, {} between nodes, all ranks\n",
             format_bytes(r.bytes_within_nodes), format_bytes(r.bytes_between_nodes));
  fmt::print("all_to_all     {} of the step, {} exposed (means over ranks and steps)\n",
             format_percent(r.all_to_all_s / r.mean_seconds),
             format_percent(r.all_to_all_exposed_s / r.mean_seconds));
  fmt::print("communication  {} of it was hidden behind computation\n", format_percent(r.hidden_share));
  print_phases(r);
}

void run(const StepBenchOptions& options) {
  validate(options);
  const train::RunConfig config = step_bench_config(options);
  LaunchOptions launch_options = options.launch;
  if (launch_options.threads == 0) launch_options.threads = config.train.threads;
  launch(launch_options, [&](const std::shared_ptr<comm::Communicator>& world) {
    remove_temporary_folders_on_signals();
    const StepBenchResult result = run_step_bench(config, options.seconds, world);
    if (world->rank() != 0) return;
    if (options.json) {
      fmt::print("{}\n", result_json(config, result).dump());
    } else {
      print_result(config, result);
    }
  });
}

}  // namespace

void add_bench_step(CLI::App& bench) {
  auto o = std::make_shared<StepBenchOptions>();
  CLI::App* verb = bench.add_subcommand("step", "A whole training step on random tokens, as train runs it");
  verb->add_option("run_file", o->run_file,
                   "the model, batch and layout of this run file, and the vocabulary of its data, instead of "
                   "the flags");
  verb->add_option("--set", o->overrides, "KEY=VALUE replaces a key of the run file");
  const auto shape = [](CLI::Option* option) { option->capture_default_str()->group(kModelGroup); };
  shape(verb->add_option("--layers", o->layers, "decoder blocks, all with experts"));
  shape(verb->add_option("--hidden", o->hidden, "model dimension"));
  shape(verb->add_option("--ffn", o->ffn, "width of one expert"));
  shape(verb->add_option("--experts", o->experts, "experts of a layer"));
  shape(verb->add_option("--top-k", o->top_k, "experts per token"));
  shape(verb->add_option("--heads", o->heads, "attention heads"));
  shape(verb->add_option("--vocab", o->vocab, "tokens in the vocabulary"));
  shape(verb->add_option("--sequences", o->sequences, "sequences of a step, all ranks"));
  shape(verb->add_option("--micro", o->micro, "sequences of a micro-step; 0 = all of the step"));
  shape(verb->add_option("--length", o->length, "tokens per sequence"));
  shape(verb->add_option("--dtype", o->dtype, "bfloat16 (fp32 masters), float32 or float64"));
  shape(verb->add_flag("--recompute", o->recompute, "recompute every block in the backward pass"));
  verb->add_option("--routing", o->routing, "learned (the router's choice) or forced (perfectly balanced)")
      ->capture_default_str();
  verb->add_option("--seconds", o->seconds, "measure for about this long")->capture_default_str();
  add_layout_options(*verb, o->layout);
  add_launch_options(*verb, o->launch);
  verb->add_option("--threads", o->launch.threads, "OpenMP threads of a rank; 0 = its share of the cores")
      ->group("Ranks");
  verb->add_flag("--json", o->json, "print one JSON object");
  verb->footer(
      "A step is everything Trainer::step() does: forward, backward, gradient sums, clipping, AdamW. Its "
      "time "
      "is the slowest\n"
      "rank's. Examples:\n"
      "  collegium bench step\n"
      "  collegium bench step --experts 64 --top-k 8 --ffn 128 --ranks 2 --overlap\n"
      "  collegium bench step configs/demo.toml --ranks 2 --json");
  verb->callback([o, verb] {
    if (!o->run_file.empty()) refuse_model_flags(*verb, o->run_file);
    run(*o);
  });
}

}  // namespace collegium::cli
