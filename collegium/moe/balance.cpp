// SPDX-License-Identifier: Apache-2.0
#include "collegium/moe/balance.h"

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/sign.h>

#include <functional>

#include "collegium/base/error.h"

namespace collegium::moe {

namespace {

constexpr double kCvGuard = 1e-10;

// One loss of one layer: its value, and d value / d sums with a row per sequence or one row for all.
struct Term {
  double value = 0.0;
  at::Tensor gradient;
};

// scale * sum_e (counts_e / tokens) (probs_e / tokens) over the whole batch.
Term batch_product(const RouterTotals& totals, const at::Tensor& counts_E, double scale) {
  const at::Tensor gradient_E = scale * counts_E / (totals.num_tokens() * totals.num_tokens());
  return {.value = (gradient_E * totals.prob_sums_E()).sum().item<double>(),
          .gradient = gradient_E.unsqueeze(0)};
}

// The same per sequence, averaged over sequences by their tokens; `product` is its sum over all ranks.
Term sequence_product(const LayerStatistics& layer, const at::Tensor& counts_BE, double product,
                      double scale) {
  const double num_tokens = layer.totals.num_tokens();
  const at::Tensor tokens_B1 = layer.local.num_tokens_B.to(at::kDouble).clamp_min(1).unsqueeze(1);
  return {.value = scale * product / num_tokens,
          .gradient = scale * counts_BE.to(at::kDouble) / tokens_B1 / num_tokens};
}

// CV^2 = variance / (mean^2 + guard), population variance.
Term cv2_term(const at::Tensor& values_E) {
  const auto num_experts = static_cast<double>(values_E.numel());
  const double mean = values_E.mean().item<double>();
  const at::Tensor centered_E = values_E - mean;
  const double variance = (centered_E * centered_E).mean().item<double>();
  const double square = mean * mean + kCvGuard;
  const at::Tensor gradient_E =
      2.0 / num_experts * (centered_E / square - variance * mean / (square * square));
  return {.value = variance / square, .gradient = gradient_E.unsqueeze(0)};
}

void accumulate(at::Tensor& target, const at::Tensor& gradient, double factor) {
  const at::Tensor scaled = gradient * factor;
  target = target.defined() ? target + scaled : scaled;
}

// Collects the terms of all layers, each averaged over the layers.
class Collector {
 public:
  Collector(BalanceLoss& loss, double num_layers, const at::TensorOptions& options)
      : loss_(loss), num_layers_(num_layers), options_(options) {}

  void add(const std::string& name, double coefficient, std::size_t layer, const Term& term,
           at::Tensor RouterStatisticsGradient::* target) {
    loss_.terms[name] += term.value / num_layers_;
    loss_.total += coefficient * term.value / num_layers_;
    if (term.gradient.defined())
      accumulate(loss_.layers[layer].*target, term.gradient.to(options_), coefficient / num_layers_);
  }

 private:
  BalanceLoss& loss_;
  double num_layers_;
  at::TensorOptions options_;
};

void add_layer(const MoeOptions& options, const LayerStatistics& layer, std::size_t index,
               Collector& collector, BalanceLoss& loss, double num_layers) {
  const BalanceOptions& balance = options.balance;
  const RouterTotals& totals = layer.totals;
  const auto num_experts = static_cast<double>(options.num_experts);
  // Of a token on average: top_k, but where experts choose.
  const double choices = totals.choice_counts_E().sum().item<double>() / totals.num_tokens();
  const double per_choice = choices > 0.0 ? num_experts / choices : 0.0;
  constexpr auto kProbs = &RouterStatisticsGradient::prob_sums_BE;
  loss.normalized_balance += totals.normalized_balance() / num_layers;
  if (balance.load_balance != 0.0) {
    const Term term = balance.load_balance_scope == LossScope::kBatch
                          ? batch_product(totals, totals.choice_counts_E(), per_choice)
                          : sequence_product(layer, layer.local.choice_counts_BE,
                                             totals.sequence_choice_product(), per_choice);
    collector.add("load_balance", balance.load_balance, index, term, kProbs);
  }
  if (balance.gshard != 0.0) {
    collector.add("gshard", balance.gshard, index,
                  sequence_product(layer, layer.local.first_counts_BE, totals.sequence_first_product(),
                                   1.0 / num_experts),
                  kProbs);
  }
  if (balance.switch_top1 != 0.0) {
    collector.add("switch_top1", balance.switch_top1, index,
                  batch_product(totals, totals.first_counts_E(), num_experts), kProbs);
  }
  if (balance.importance_cv2 != 0.0) {
    const bool weights = balance.importance_of == ImportanceOf::kWeights;
    collector.add("importance_cv2", balance.importance_cv2, index,
                  cv2_term(weights ? totals.importance_E() : totals.prob_sums_E()),
                  weights ? &RouterStatisticsGradient::importance_BE : kProbs);
  }
  if (balance.load_cv2 != 0.0) {
    // Without noise (evaluation) the load is a count and has no gradient.
    Term term = cv2_term(totals.load_E());
    if (!totals.load_is_smooth()) term.gradient = at::Tensor();
    collector.add("load_cv2", balance.load_cv2, index, term, &RouterStatisticsGradient::load_BE);
  }
  if (balance.z_loss != 0.0) {
    const double value = totals.squared_lse() / totals.num_tokens();
    collector.add("z_loss", balance.z_loss, index, {.value = value, .gradient = {}}, kProbs);
    loss.layers[index].squared_lse = balance.z_loss / num_layers / totals.num_tokens();
  }
}

}  // namespace

double hf_pooled_loss(const MoeOptions& options, std::span<const RouterTotals> layers, double coefficient,
                      std::span<RouterStatisticsGradient> gradients,
                      const at::TensorOptions& gradient_options) {
  RouterTotals pooled(options.num_experts);
  for (const RouterTotals& totals : layers) pooled += totals;
  const double num_rows = pooled.num_tokens();
  if (num_rows == 0.0) return 0.0;
  const at::Tensor gradient_E =
      static_cast<double>(options.num_experts) * pooled.choice_counts_E() / (num_rows * num_rows);
  for (RouterStatisticsGradient& gradient : gradients)
    accumulate(gradient.prob_sums_BE, gradient_E.unsqueeze(0).to(gradient_options), coefficient);
  return (gradient_E * pooled.prob_sums_E()).sum().item<double>();
}

BalanceLoss balance_loss(const MoeOptions& options, std::span<const LayerStatistics> layers) {
  const at::NoGradGuard no_grad;
  BalanceLoss loss;
  loss.layers.resize(layers.size());
  if (layers.empty() || layers[0].totals.num_tokens() == 0.0) return loss;
  const auto num_layers = static_cast<double>(layers.size());
  // Totals are on the CPU; a layer's backward pass reads its gradients where it runs.
  const at::TensorOptions gradient_options = layers[0].local.prob_sums_BE.options();
  Collector collector(loss, num_layers, gradient_options);
  for (std::size_t i = 0; i < layers.size(); ++i)
    add_layer(options, layers[i], i, collector, loss, num_layers);
  if (options.balance.hf_pooled != 0.0) {
    std::vector<RouterTotals> totals;
    for (const LayerStatistics& layer : layers) totals.push_back(layer.totals);
    const double value =
        hf_pooled_loss(options, totals, options.balance.hf_pooled, loss.layers, gradient_options);
    loss.terms["hf_pooled"] = value;
    loss.total += options.balance.hf_pooled * value;
  }
  return loss;
}

void update_expert_bias(at::Tensor& expert_bias_E, const at::Tensor& choice_counts_E, double rate) {
  COLLEGIUM_CHECK(choice_counts_E.scalar_type() == at::kLong, "counts must be exact (int64)");
  // sign(mean - c) = sign(sum - E c), in integers.
  const at::Tensor excess_E = choice_counts_E.sum() - choice_counts_E.numel() * choice_counts_E;
  expert_bias_E.add_(at::sign(excess_E).to(expert_bias_E.options()), rate);
}

}  // namespace collegium::moe
