// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "collegium/base/units.h"
#include "collegium/cli/train_loop.h"

namespace collegium::cli {

namespace {

// Of what begins anew, the same command would begin anew again.
std::string without_starting_over(const TrainRequest& request) {
  std::vector<std::string> options;
  if (request.fresh) options.emplace_back("--fresh");
  if (!request.weights_only.empty()) options.emplace_back("--weights-only");
  return options.empty() ? "" : fmt::format(" without {}", fmt::join(options, " and "));
}

void print_specialization(const TrainSummary& summary) {
  const auto& layers = summary.validation.specialization;
  if (layers.empty()) return;
  const std::size_t num_experts = layers[0].share.empty() ? 0 : layers[0].share[0].size();
  constexpr std::size_t kWidest = 16;  // wider tables wrap; the numbers are in metrics.jsonl
  fmt::print("\nWhich experts took which domain (% of the domain's choices; {:.1f} % = even)\n",
             100.0 / static_cast<double>(std::max<std::size_t>(1, num_experts)));
  for (const auto& layer : layers) {
    fmt::print(
        "layer {}: normalised mutual information {:.3f} (shuffled labels: mean {:.3f}, largest {:.3f})\n",
        layer.layer, layer.nmi, layer.nmi_shuffled, layer.nmi_shuffled_max);
    if (num_experts > kWidest) continue;
    for (std::size_t d = 0; d < layer.share.size(); ++d) {
      fmt::print("  {:<12}", summary.domains[d]);
      for (const double share : layer.share[d]) fmt::print(" {:>5.1f}", 100.0 * share);
      fmt::print("\n");
    }
  }
}

}  // namespace

void print_summary(const train::RunConfig& config, const TrainRequest& request, const TrainSummary& summary) {
  if (summary.stop != Stop::kNot) {
    const std::string reason =
        summary.stop == Stop::kTime
            ? fmt::format("the time of train.max_minutes = {:g} is up", config.train.max_minutes)
            : "stopped";
    fmt::print("{} after step {} of {}; run the same command{} to continue\n", reason, summary.steps,
               config.train.steps, without_starting_over(request));
  }
  if (summary.stop != Stop::kSignal) {
    fmt::print("validation loss {:.4f} nats/token over {} tokens (unigram entropy {:.4f})\n",
               summary.validation.loss, summary.validation.num_targets, summary.unigram_entropy);
    for (std::size_t d = 0; d < summary.domains.size(); ++d) {
      const double loss = summary.validation.domain_loss[d];
      fmt::print("  {:<12} {}\n", summary.domains[d],
                 std::isnan(loss) ? "no validation window" : fmt::format("{:.4f} nats/token", loss));
    }
    print_specialization(summary);
    if (!summary.sample.empty()) fmt::print("\nSample\n------\n{}\n------\n", summary.sample);
  }
  if (summary.tokens_per_s > 0.0) {
    fmt::print("\ntrained for {} at {:.0f} tokens/s, {} of the GEMM peak\n", format_duration(summary.seconds),
               summary.tokens_per_s, format_percent(summary.share_of_gemm_peak));
  }
  if (!summary.comparison.empty()) fmt::print("\n{}\n", train::comparison_text(summary.comparison));
  fmt::print("checkpoint  {}\nmetrics     {}\n", summary.checkpoint.string(), summary.metrics.string());
}

Json summary_json(const TrainSummary& summary) {
  const bool validated = summary.stop != Stop::kSignal;
  Json stopped_by;
  if (summary.stop != Stop::kNot) stopped_by = summary.stop == Stop::kTime ? "max_minutes" : "signal";
  Json domain_loss = Json::object();
  for (std::size_t d = 0; validated && d < summary.domains.size(); ++d)
    domain_loss[summary.domains[d]] = summary.validation.domain_loss[d];
  Json layers = Json::array();
  for (const auto& layer : summary.validation.specialization) layers.push_back(write_fields(layer));
  return {{"steps", summary.steps},
          {"stopped_early", summary.stop != Stop::kNot},
          {"stopped_by", stopped_by},
          {"validation_loss", validated ? Json(summary.validation.loss) : Json()},
          {"domains", summary.domains},
          {"domain_loss", domain_loss},
          {"unigram_entropy", summary.unigram_entropy},
          {"tokens_per_s", summary.tokens_per_s},
          {"share_of_gemm_peak", summary.share_of_gemm_peak},
          {"dispatcher", summary.dispatcher},
          {"specialization", layers},
          {"sample", summary.sample},
          {"planner", train::comparison_json(summary.comparison)},
          {"checkpoint", summary.checkpoint.string()},
          {"metrics", summary.metrics.string()}};
}

}  // namespace collegium::cli
