// SPDX-License-Identifier: Apache-2.0
#include "collegium/moe/balance.h"

#include <ATen/ATen.h>

#include <functional>

#include "collegium/base/error.h"

namespace collegium::moe {

namespace {

constexpr double kCvGuard = 1e-10;

// A layer's statistics as sums over the whole batch, in the router's dtype.
struct BatchSums {
  double num_tokens = 0.0;
  at::Tensor tokens_B1;
  at::Tensor choices_BE;
  at::Tensor first_BE;
  at::Tensor probs_BE;
};

BatchSums sum_batch(const RouterStatistics& statistics) {
  const auto options = statistics.prob_sums_BE.options();
  return {.num_tokens = statistics.num_tokens_B.sum().item<double>(),
          .tokens_B1 = statistics.num_tokens_B.to(options).unsqueeze(1),
          .choices_BE = statistics.choice_counts_BE.to(options),
          .first_BE = statistics.first_counts_BE.to(options),
          .probs_BE = statistics.prob_sums_BE};
}

// One loss of one layer: its value, and d value / d sums with a row per sequence or one row for all.
struct Term {
  double value = 0.0;
  at::Tensor gradient;
};

// scale * sum_e (counts_e / tokens) (probs_e / tokens), over the batch or per sequence weighted by its
// tokens.
Term product_term(const BatchSums& sums, const at::Tensor& counts_BE, double scale, LossScope scope) {
  if (scope == LossScope::kBatch) {
    const at::Tensor fraction_1E = counts_BE.sum(0, true) / sums.num_tokens;
    const at::Tensor gradient_1E = scale * fraction_1E / sums.num_tokens;
    return {.value = (gradient_1E * sums.probs_BE.sum(0, true)).sum().item<double>(),
            .gradient = gradient_1E};
  }
  const at::Tensor gradient_BE = scale * counts_BE / sums.tokens_B1.clamp_min(1) / sums.num_tokens;
  return {.value = (gradient_BE * sums.probs_BE).sum().item<double>(), .gradient = gradient_BE};
}

// CV^2 = variance / (mean^2 + guard), population variance.
Term cv2_term(const at::Tensor& values_BE) {
  const at::Tensor v_1E = values_BE.sum(0, true);
  const auto num_experts = static_cast<double>(v_1E.numel());
  const double mean = v_1E.mean().item<double>();
  const at::Tensor centered_1E = v_1E - mean;
  const double variance = (centered_1E * centered_1E).mean().item<double>();
  const double square = mean * mean + kCvGuard;
  return {.value = variance / square,
          .gradient = 2.0 / num_experts * (centered_1E / square - variance * mean / (square * square))};
}

void accumulate(at::Tensor& target, const at::Tensor& gradient, double factor) {
  const at::Tensor scaled = gradient * factor;
  target = target.defined() ? target + scaled : scaled;
}

// Collects the terms of all layers, each averaged over the layers.
class Collector {
 public:
  Collector(BalanceLoss& loss, double num_layers) : loss_(loss), num_layers_(num_layers) {}

  void add(const std::string& name, double coefficient, std::size_t layer, const Term& term,
           at::Tensor RouterStatisticsGradient::* target) {
    loss_.terms[name] += term.value / num_layers_;
    loss_.total += coefficient * term.value / num_layers_;
    if (term.gradient.defined())
      accumulate(loss_.layers[layer].*target, term.gradient, coefficient / num_layers_);
  }

 private:
  BalanceLoss& loss_;
  double num_layers_;
};

void add_layer(const MoeOptions& options, const RouterStatistics& statistics, std::size_t layer,
               Collector& collector, BalanceLoss& loss, double num_layers) {
  const BalanceOptions& balance = options.balance;
  const auto num_experts = static_cast<double>(options.num_experts);
  const auto top_k = static_cast<double>(options.top_k);
  const BatchSums sums = sum_batch(statistics);
  constexpr auto kProbs = &RouterStatisticsGradient::prob_sums_BE;
  const Term batch = product_term(sums, sums.choices_BE, num_experts / top_k, LossScope::kBatch);
  loss.normalized_balance += batch.value / num_layers;
  if (balance.load_balance != 0.0) {
    const Term term = balance.load_balance_scope == LossScope::kBatch
                          ? batch
                          : product_term(sums, sums.choices_BE, num_experts / top_k, LossScope::kSequence);
    collector.add("load_balance", balance.load_balance, layer, term, kProbs);
  }
  if (balance.gshard != 0.0) {
    collector.add("gshard", balance.gshard, layer,
                  product_term(sums, sums.first_BE, 1.0 / num_experts, LossScope::kSequence), kProbs);
  }
  if (balance.switch_top1 != 0.0) {
    collector.add("switch_top1", balance.switch_top1, layer,
                  product_term(sums, sums.first_BE, num_experts, LossScope::kBatch), kProbs);
  }
  if (balance.importance_cv2 != 0.0) {
    const bool weights = balance.importance_of == ImportanceOf::kWeights;
    collector.add("importance_cv2", balance.importance_cv2, layer,
                  cv2_term(weights ? statistics.importance_BE : statistics.prob_sums_BE),
                  weights ? &RouterStatisticsGradient::importance_BE : kProbs);
  }
  if (balance.load_cv2 != 0.0) {
    // Without noise (evaluation) the load is a count and has no gradient.
    Term term = cv2_term(statistics.load_BE.defined() ? statistics.load_BE : sums.choices_BE);
    if (!statistics.load_BE.defined()) term.gradient = at::Tensor();
    collector.add("load_cv2", balance.load_cv2, layer, term, &RouterStatisticsGradient::load_BE);
  }
  if (balance.z_loss != 0.0) {
    const double value = statistics.squared_lse_B.sum().item<double>() / sums.num_tokens;
    collector.add("z_loss", balance.z_loss, layer, {.value = value, .gradient = {}}, kProbs);
    loss.layers[layer].squared_lse = balance.z_loss / num_layers / sums.num_tokens;
  }
}

}  // namespace

double hf_pooled_loss(const MoeOptions& options, std::span<const RouterStatistics> layers, double coefficient,
                      std::span<RouterStatisticsGradient> gradients) {
  at::Tensor counts_1E;
  at::Tensor probs_1E;
  double num_rows = 0.0;
  for (const RouterStatistics& statistics : layers) {
    const BatchSums sums = sum_batch(statistics);
    num_rows += sums.num_tokens;
    accumulate(counts_1E, sums.choices_BE.sum(0, true), 1.0);
    accumulate(probs_1E, sums.probs_BE.sum(0, true), 1.0);
  }
  if (num_rows == 0.0) return 0.0;
  const at::Tensor gradient_1E = static_cast<double>(options.num_experts) * counts_1E / (num_rows * num_rows);
  for (RouterStatisticsGradient& gradient : gradients)
    accumulate(gradient.prob_sums_BE, gradient_1E, coefficient);
  return (gradient_1E * probs_1E).sum().item<double>();
}

BalanceLoss balance_loss(const MoeOptions& options, std::span<const RouterStatistics> layers) {
  const at::NoGradGuard no_grad;
  BalanceLoss loss;
  loss.layers.resize(layers.size());
  if (layers.empty() || layers[0].num_tokens_B.sum().item<std::int64_t>() == 0) return loss;
  const auto num_layers = static_cast<double>(layers.size());
  Collector collector(loss, num_layers);
  for (std::size_t layer = 0; layer < layers.size(); ++layer) {
    add_layer(options, layers[layer], layer, collector, loss, num_layers);
  }
  if (options.balance.hf_pooled != 0.0) {
    const double value = hf_pooled_loss(options, layers, options.balance.hf_pooled, loss.layers);
    loss.terms["hf_pooled"] = value;
    loss.total += options.balance.hf_pooled * value;
  }
  return loss;
}

void update_expert_bias(at::Tensor& expert_bias_E, const at::Tensor& choice_counts_E, double rate) {
  COLLEGIUM_CHECK(choice_counts_E.scalar_type() == at::kLong, "counts must be exact (int64)");
  // sign(mean - c) = sign(sum - E c), in integers.
  const at::Tensor excess_E = choice_counts_E.sum() - choice_counts_E.numel() * choice_counts_E;
  expert_bias_E.add_(at::sign(excess_E).to(expert_bias_E.scalar_type()), rate);
}

}  // namespace collegium::moe
