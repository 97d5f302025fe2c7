// SPDX-License-Identifier: Apache-2.0
#include <cmath>

#include "collegium/moe/reference/router_reference.h"

namespace collegium::moe::reference {

namespace {

using Vector = std::vector<double>;

// scale * sum_e (share of choices) (mean probability) over tokens [begin, end); first choices only, or all.
double product(const MoeOptions& o, const std::vector<TokenRouting>& tokens, std::size_t begin,
               std::size_t end, bool first_only, double scale) {
  const double count = static_cast<double>(end - begin);
  double sum = 0.0;
  for (std::size_t e = 0; e < static_cast<std::size_t>(o.num_experts); ++e) {
    double choices = 0.0;
    double probability = 0.0;
    for (std::size_t t = begin; t < end; ++t) {
      probability += tokens[t].probabilities[e];
      for (std::size_t k = 0; k < (first_only ? 1 : tokens[t].chosen.size()); ++k) {
        if (tokens[t].chosen[k] == static_cast<int>(e)) choices += 1.0;
      }
    }
    sum += choices / count * (probability / count);
  }
  return scale * sum;
}

double squared_cv(const Vector& values) {
  double mean = 0.0;
  double square = 0.0;
  for (const double value : values) mean += value / static_cast<double>(values.size());
  for (const double value : values)
    square += (value - mean) * (value - mean) / static_cast<double>(values.size());
  return square / (mean * mean + 1e-10);
}

}  // namespace

std::map<std::string, double> losses(const MoeOptions& o, const std::vector<TokenRouting>& tokens,
                                     const TokenContext& c) {
  std::map<std::string, double> result;
  const auto num_experts = static_cast<double>(o.num_experts);
  double choices = 0.0;
  for (const TokenRouting& token : tokens) {
    for (const int expert : token.chosen) choices += expert >= 0 ? 1.0 : 0.0;
  }
  const double per_choice = choices > 0.0 ? num_experts * static_cast<double>(tokens.size()) / choices : 0.0;
  const std::size_t length = static_cast<std::size_t>(c.sequence_length);
  double by_sequence = 0.0;
  double gshard = 0.0;
  for (std::size_t begin = 0; begin < tokens.size(); begin += length) {
    by_sequence +=
        product(o, tokens, begin, begin + length, false, per_choice) / static_cast<double>(c.num_sequences);
    gshard += product(o, tokens, begin, begin + length, true, 1.0 / num_experts) /
              static_cast<double>(c.num_sequences);
  }
  const bool batch = o.balance.load_balance_scope == LossScope::kBatch;
  result["load_balance"] = batch ? product(o, tokens, 0, tokens.size(), false, per_choice) : by_sequence;
  result["gshard"] = gshard;
  result["switch_top1"] = product(o, tokens, 0, tokens.size(), true, num_experts);
  result["hf_pooled"] = product(o, tokens, 0, tokens.size(), false, num_experts);
  Vector importance(static_cast<std::size_t>(o.num_experts), 0.0);
  Vector load(static_cast<std::size_t>(o.num_experts), 0.0);
  double square = 0.0;
  for (const TokenRouting& token : tokens) {
    square += token.lse * token.lse / static_cast<double>(tokens.size());
    for (std::size_t k = 0; k < token.chosen.size(); ++k) {
      if (token.chosen[k] < 0) continue;
      const auto e = static_cast<std::size_t>(token.chosen[k]);
      if (o.balance.importance_of == ImportanceOf::kWeights) importance[e] += token.importance[k];
      if (token.load.empty()) load[e] += 1.0;
    }
    for (std::size_t e = 0; e < importance.size(); ++e) {
      if (o.balance.importance_of == ImportanceOf::kProbabilities) importance[e] += token.probabilities[e];
      if (!token.load.empty()) load[e] += token.load[e];
    }
  }
  result["importance_cv2"] = squared_cv(importance);
  result["load_cv2"] = squared_cv(load);
  result["z_loss"] = square;
  return result;
}

}  // namespace collegium::moe::reference
