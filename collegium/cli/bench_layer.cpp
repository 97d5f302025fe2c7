// SPDX-License-Identifier: Apache-2.0
#include "collegium/cli/bench_layer.h"

#include <fmt/format.h>

#include <CLI/CLI.hpp>

#include "collegium/base/error.h"
#include "collegium/base/units.h"
#include "collegium/cli/bench.h"
#include "collegium/model/tensor_io.h"

namespace collegium::cli {

namespace {

Json bytes_json(const ArrowBytes& counted) {
  return {{"within_nodes", counted.within_nodes}, {"between_nodes", counted.between_nodes}};
}

Json setting_json(const LayerBenchOptions& o, const LayerBenchResult& r) {
  return {{"tokens", o.tokens},
          {"hidden", o.hidden},
          {"ffn", o.ffn},
          {"experts", o.experts},
          {"top_k", o.top_k},
          {"dtype", o.dtype},
          {"routing", enum_name(o.routing)},
          {"skew", o.routing == BenchRouting::kForced ? Json(enum_name(o.skew)) : Json()},
          {"dispatcher", enum_name(r.dispatcher.kind)},
          {"chunks", o.parallel.overlap.chunks},
          {"overlap", o.parallel.overlap.weight_gradients},
          {"ranks", r.ranks},
          {"ep", r.ep},
          {"nodes", r.nodes},
          {"threads_per_rank", r.threads_per_rank}};
}

Json result_json(const LayerBenchOptions& o, const LayerBenchResult& r) {
  Json json = setting_json(o, r);
  json["runs"] = r.runs;
  json["seconds_min"] = r.seconds.min;
  json["seconds_median"] = r.seconds.median;
  json["seconds_max"] = r.seconds.max;
  json["gflops"] = r.flops / r.seconds.min / 1e9;
  json["gflops_median"] = r.flops / r.seconds.median / 1e9;
  json["gemm_floor_seconds"] = r.floor_seconds.min;
  json["gemm_floor_seconds_median"] = r.floor_seconds.median;
  json["gemm_floor_schedule"] = r.floor_across ? "across" : "inside";
  json["fraction_of_gemm_floor"] = r.floor_fraction();
  json["gemm_peak_gflops"] = r.gemm_peak_flops_per_s / 1e9;
  json["fraction_of_gemm_peak"] = r.flops / r.seconds.min / r.gemm_peak_flops_per_s;
  json["rows_max_over_mean"] = r.rows_max_over_mean;
  for (std::size_t i = 0; i < moe::kStageNames.size(); ++i)
    json["stage_seconds"][std::string(moe::kStageNames[i].second)] = r.stage_seconds[i];
  json["bytes"]["plan"] = bytes_json(r.plan);
  for (std::size_t i = 0; i < kArrows.size(); ++i) {
    Json arrow = bytes_json(r.counted[i]);
    arrow["expected_within_nodes"] = r.expected[i].within_nodes;
    arrow["expected_between_nodes"] = r.expected[i].between_nodes;
    json["bytes"][std::string(kArrows[i])] = arrow;
  }
  json["remote_copies"] = r.remote_copies;
  json["expected_remote_copies"] = r.expected_remote_copies;
  json["communication_seconds"] = r.communication_s;
  json["communication_exposed_seconds"] = r.communication_s - r.communication_hidden_s;
  json["all_to_all_seconds"] = r.all_to_all_s;
  json["all_to_all_exposed_seconds"] = r.all_to_all_s - r.all_to_all_hidden_s;
  return json;
}

double share(double part, double whole) { return whole > 0.0 ? part / whole : 0.0; }

void print_speed(const LayerBenchResult& r) {
  fmt::print("time           {} least, {} median, {} most of {} runs\n", format_seconds(r.seconds.min),
             format_seconds(r.seconds.median), format_seconds(r.seconds.max), r.runs);
  fmt::print("speed          {} at the least time, {} at the median\n",
             format_gflops(r.flops / r.seconds.min), format_gflops(r.flops / r.seconds.median));
  fmt::print("GEMM floor     {}, {} ({}): the layer reaches {} of it\n", format_seconds(r.floor_seconds.min),
             format_gflops(r.flops / r.floor_seconds.min),
             r.floor_across ? "experts across threads" : "threads inside each product",
             format_percent(r.floor_fraction()));
  fmt::print("GEMM peak      {}: the layer reaches {} of it\n", format_gflops(r.gemm_peak_flops_per_s),
             format_percent(r.flops / r.seconds.min / r.gemm_peak_flops_per_s));
}

void print_stages(const LayerBenchResult& r) {
  double total = 0.0;
  for (const double seconds : r.stage_seconds) total += seconds;
  fmt::print("stages, mean over runs and ranks\n");
  for (std::size_t i = 0; i < moe::kStageNames.size(); ++i) {
    if (r.stage_seconds[i] == 0.0) continue;
    fmt::print("  {:<24} {:>9}  {:>6}\n", moe::kStageNames[i].second, format_seconds(r.stage_seconds[i]),
               format_percent(share(r.stage_seconds[i], total)));
  }
}

void print_communication(const LayerBenchResult& r) {
  fmt::print("bytes sent, all ranks     within nodes   between nodes  (both as the routing asks)\n");
  for (std::size_t i = 0; i < kArrows.size(); ++i) {
    fmt::print("  {:<20} {:>16} {:>15}\n", kArrows[i],
               format_bytes(static_cast<double>(r.counted[i].within_nodes)),
               format_bytes(static_cast<double>(r.counted[i].between_nodes)));
  }
  fmt::print("  {:<20} {:>16} {:>15}\n", "plan", format_bytes(static_cast<double>(r.plan.within_nodes)),
             format_bytes(static_cast<double>(r.plan.between_nodes)));
  fmt::print("all_to_all     {} under way, {} hidden; all communication {}, {} hidden (means over ranks)\n",
             format_seconds(r.all_to_all_s), format_percent(share(r.all_to_all_hidden_s, r.all_to_all_s)),
             format_seconds(r.communication_s),
             format_percent(share(r.communication_hidden_s, r.communication_s)));
  fmt::print("rows           the busiest rank has {:.2f} times the mean\n", r.rows_max_over_mean);
  if (r.nodes > 1) {
    fmt::print("other nodes    {} copies would do, one per token and node ({:.0f} expected if random)\n",
               r.remote_copies, r.expected_remote_copies);
  }
}

void print_result(const LayerBenchOptions& o, const LayerBenchResult& r) {
  fmt::print("layer          {} tokens x {}, {} experts of width {}, top {}, {}, routing {}\n", o.tokens,
             o.hidden, o.experts, o.ffn, o.top_k, o.dtype,
             o.routing == BenchRouting::kForced ? enum_name(o.skew) : enum_name(o.routing));
  fmt::print("ranks          {} of {} threads, ep = {}, dispatcher {}\n", r.ranks, r.threads_per_rank, r.ep,
             describe_layout(r.dispatcher, o.parallel.overlap));
  print_speed(r);
  print_stages(r);
  if (r.ep > 1) print_communication(r);
}

void run(LayerBenchOptions options) {
  validate(options);
  launch(options.launch, [&](const std::shared_ptr<comm::Communicator>& world) {
    const LayerBenchResult result = run_layer_bench(options, world);
    if (world->rank() != 0) return;
    if (options.json) {
      fmt::print("{}\n", result_json(options, result).dump());
    } else {
      print_result(options, result);
    }
  });
}

}  // namespace

void validate(LayerBenchOptions& o) {
  require_config(o.tokens >= 1, "--tokens {}: must be at least 1", o.tokens);
  require_config(o.hidden >= 1, "--hidden {}: must be at least 1", o.hidden);
  require_config(o.ffn >= 1, "--ffn {}: must be at least 1", o.ffn);
  require_config(o.experts >= 1, "--experts {}: must be at least 1", o.experts);
  require_config(o.top_k >= 1 && o.top_k <= o.experts, "--top-k {}: must be between 1 and --experts = {}",
                 o.top_k, o.experts);
  require_config(o.seconds > 0.0, "--seconds {}: must be positive", o.seconds);
  const at::ScalarType dtype = model::parse_dtype(o.dtype, "--dtype");
  read_fields(Json(o.routing_name), "--routing", o.routing);
  read_fields(Json(o.skew_name), "--skew", o.skew);
  require_config(o.routing == BenchRouting::kForced || o.skew == moe::Skew::kBalanced,
                 "--skew {}: goes with --routing forced, not with {}", o.skew_name, o.routing_name);
  apply_layout(o.layout, dtype, o.parallel);
  parallel::validate(o.parallel);
}

void add_bench_layer(CLI::App& bench) {
  auto options = std::make_shared<LayerBenchOptions>();
  CLI::App* verb = bench.add_subcommand("layer", "One MoE layer, forward and backward, beside its bounds");
  const auto shape = [](CLI::Option* option) { option->capture_default_str()->group("Layer"); };
  shape(verb->add_option("--tokens", options->tokens, "tokens of all ranks together, shared evenly"));
  shape(verb->add_option("--hidden", options->hidden, "model dimension"));
  shape(verb->add_option("--ffn", options->ffn, "width of one expert"));
  shape(verb->add_option("--experts", options->experts, "experts, all ranks"));
  shape(verb->add_option("--top-k", options->top_k, "experts per token"));
  shape(verb->add_option("--dtype", options->dtype, "bfloat16, float32 or float64"));
  shape(verb->add_option("--routing", options->routing_name,
                         "forced (--skew), random (all sets of experts equally likely) or learned (the "
                         "router chooses, with random weights)"));
  shape(verb->add_option("--skew", options->skew_name,
                         "W0 balanced, W1 hot expert, W2 hot rank, W3 hot experts on all ranks, W4 ragged "
                         "source, W5 a rank without rows, W6 rotating hot expert, W7 bursts"));
  verb->add_option("--seconds", options->seconds, "measure for about this long")->capture_default_str();
  add_layout_options(*verb, options->layout);
  add_launch_options(*verb, options->launch);
  verb->add_option("--threads", options->launch.threads,
                   "OpenMP threads of a rank; 0 = its share of the cores")
      ->group("Ranks");
  verb->add_flag("--json", options->json, "print one JSON object");
  verb->footer(
      "A run is one forward and one backward pass; its time is the slowest rank's. After each run the GEMM "
      "floor is timed:\n"
      "the nine products of every expert at the same row counts. Bytes are compared with what the routing "
      "asks for;\n"
      "a difference is an error.\n"
      "Examples:\n"
      "  collegium bench layer --experts 64 --top-k 8 --ffn 128\n"
      "  collegium bench layer --ranks 2 --skew W2 --dispatcher padded --json\n"
      "  collegium bench layer --ranks 8 --backend local --dispatcher two_level --routing random \\\n"
      "    --emulate nodes=4x2,intra=3GB/s:20us,inter=500MB/s:100us");
  verb->callback([options] { run(*options); });
}

}  // namespace collegium::cli
