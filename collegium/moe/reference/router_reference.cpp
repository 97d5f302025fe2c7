// SPDX-License-Identifier: Apache-2.0
#include "collegium/moe/reference/router_reference.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>

#include "collegium/base/rng.h"

namespace collegium::moe::reference {

namespace {

using ops::reference::softmax;
using Vector = std::vector<double>;
constexpr double kInfinity = std::numeric_limits<double>::infinity();

std::uint64_t unsign(std::int64_t value) { return static_cast<std::uint64_t>(value); }

RandomStream stream(const TokenContext& context, const char* purpose) {
  return {context.seed, purpose, unsign(context.step), unsign(context.layer)};
}

Vector row(const Matrix& m, std::int64_t index) {
  return {m.values.begin() + index * m.columns, m.values.begin() + (index + 1) * m.columns};
}

struct Logits {
  Vector clean;
  Vector noisy;
  Vector deviation;
};

Logits logits_of(const MoeOptions& o, const RouterInputs& in, const TokenContext& c, std::int64_t token) {
  Vector x = row(in.x_TD, token);
  const std::uint64_t global = unsign(c.first_token() + token);
  if (c.training && (o.router.noise == Noise::kJitterRouter || o.router.noise == Noise::kJitterInput)) {
    const double eps = o.router.jitter_epsilon;
    for (std::size_t d = 0; d < x.size(); ++d)
      x[d] *= 1.0 - eps + 2.0 * eps * stream(c, "router/jitter").uniform(global, d);
  }
  Logits logits;
  logits.clean = ops::reference::matrix_vector(in.gate_ED, x);
  logits.noisy = logits.clean;
  if (o.router.noise != Noise::kNoisyTopK || !c.training) return logits;
  const Vector raw = ops::reference::matrix_vector(in.noise_ED, x);
  for (std::size_t e = 0; e < raw.size(); ++e) {
    logits.deviation.push_back(std::log1p(std::exp(raw[e])) + 0.01);
    logits.noisy[e] += stream(c, "router/noisy_top_k").normal(global, e) * logits.deviation[e];
  }
  return logits;
}

// Probability that expert i would be chosen if only its noise were drawn again.
Vector smooth_load(const Logits& logits, std::int64_t top_k) {
  const std::size_t num_experts = logits.clean.size();
  Vector load(num_experts, 1.0);
  if (top_k >= static_cast<std::int64_t>(num_experts)) return load;
  for (std::size_t i = 0; i < num_experts; ++i) {
    Vector others = logits.noisy;
    others.erase(others.begin() + static_cast<std::ptrdiff_t>(i));
    std::sort(others.rbegin(), others.rend());
    const double kth_excluding = others[static_cast<std::size_t>(top_k - 1)];
    load[i] = 0.5 * std::erfc(-(logits.clean[i] - kth_excluding) / logits.deviation[i] / std::sqrt(2.0));
  }
  return load;
}

Vector mask_groups(const MoeOptions& o, Vector scores) {
  const RouterOptions& r = o.router;
  if (r.num_groups <= 1) return scores;
  const auto size = static_cast<std::size_t>(o.num_experts / r.num_groups);
  Vector group_scores;
  for (std::size_t g = 0; g < static_cast<std::size_t>(r.num_groups); ++g) {
    Vector members(scores.begin() + static_cast<std::ptrdiff_t>(g * size),
                   scores.begin() + static_cast<std::ptrdiff_t>((g + 1) * size));
    std::sort(members.rbegin(), members.rend());
    std::size_t count = 1;
    if (r.group_score == GroupScore::kTopTwoSum) count = 2;
    if (r.group_score == GroupScore::kTopSum)
      count = static_cast<std::size_t>(std::max<std::int64_t>(1, o.top_k / r.top_groups));
    count = std::min(count, size);
    group_scores.push_back(
        std::accumulate(members.begin(), members.begin() + static_cast<std::ptrdiff_t>(count), 0.0));
  }
  const auto best = ops::reference::topk(group_scores, r.top_groups);
  for (std::size_t e = 0; e < scores.size(); ++e) {
    if (std::find(best.begin(), best.end(), static_cast<std::int64_t>(e / size)) == best.end())
      scores[e] = -kInfinity;
  }
  return scores;
}

// Rows [begin, end) of exp(logits) scaled until rows and columns have equal sums: multiplicative, as in the
// definition.
void balance_group(std::int64_t iterations, std::int64_t begin, std::int64_t end, Matrix& mass) {
  const auto num_tokens = static_cast<double>(end - begin);
  for (std::int64_t i = 0; i < iterations; ++i) {
    for (std::int64_t t = begin; t < end; ++t) {
      double sum = 0.0;
      for (std::int64_t e = 0; e < mass.columns; ++e) sum += mass.at(t, e);
      for (std::int64_t e = 0; e < mass.columns; ++e) mass.at(t, e) /= sum * num_tokens;
    }
    for (std::int64_t e = 0; e < mass.columns; ++e) {
      double sum = 0.0;
      for (std::int64_t t = begin; t < end; ++t) sum += mass.at(t, e);
      for (std::int64_t t = begin; t < end; ++t) mass.at(t, e) /= sum * static_cast<double>(mass.columns);
    }
  }
}

Matrix sinkhorn(const MoeOptions& o, const TokenContext& c, const std::vector<Logits>& logits) {
  const auto num_tokens = static_cast<std::int64_t>(logits.size());
  Matrix mass(num_tokens, static_cast<std::int64_t>(logits[0].noisy.size()));
  for (std::int64_t t = 0; t < num_tokens; ++t) {
    for (std::int64_t e = 0; e < mass.columns; ++e)
      mass.at(t, e) = std::exp(logits[static_cast<std::size_t>(t)].noisy[static_cast<std::size_t>(e)]);
  }
  const std::int64_t group = o.capacity.group_sequences * c.sequence_length;
  for (std::int64_t begin = 0; begin < num_tokens; begin += group) {
    const std::int64_t end = std::min(begin + group, num_tokens);
    if (end - begin == 1) {
      const Vector alone = softmax(logits[static_cast<std::size_t>(begin)].noisy);
      for (std::int64_t e = 0; e < mass.columns; ++e) mass.at(begin, e) = alone[static_cast<std::size_t>(e)];
      continue;
    }
    balance_group(o.router.sinkhorn_iterations, begin, end, mass);
    // A token's masses sum to about one.
    for (std::int64_t t = begin; t < end; ++t) {
      for (std::int64_t e = 0; e < mass.columns; ++e) mass.at(t, e) *= static_cast<double>(end - begin);
    }
  }
  return mass;
}

Vector scores_of(const MoeOptions& o, const Vector& z) {
  if (o.router.score == ScoreFunction::kSoftmax) return softmax(z);
  Vector s;
  for (const double value : z) s.push_back(1.0 / (1.0 + std::exp(-value)));
  return s;
}

// Expert 0 is the first choice of one token in E / (skew K), evenly spaced; all other choices go round the
// others.
std::vector<int> skewed_choice(const MoeOptions& o, std::uint64_t global) {
  const double share =
      o.router.forced_skew * static_cast<double>(o.top_k) / static_cast<double>(o.num_experts);
  const double before = std::floor(static_cast<double>(global) * share);
  const bool hot = std::floor(static_cast<double>(global + 1) * share) > before;
  std::vector<int> chosen;
  chosen.reserve(unsign(o.top_k));
  if (hot) chosen.push_back(0);
  std::uint64_t number = global * unsign(o.top_k) - static_cast<std::uint64_t>(before);
  while (chosen.size() < unsign(o.top_k))
    chosen.push_back(static_cast<int>(1 + number++ % (unsign(o.num_experts) - 1)));
  return chosen;
}

std::vector<int> choose(const MoeOptions& o, const RouterInputs& in, const TokenContext& c,
                        const std::vector<Logits>& logits, std::int64_t token, const Matrix& balanced) {
  const Logits& z = logits[static_cast<std::size_t>(token)];
  const std::uint64_t global = unsign(c.first_token() + token);
  std::vector<int> chosen;
  if (o.router.selection == Selection::kForcedBalance) {
    for (std::uint64_t k = 0; k < unsign(o.top_k); ++k)
      chosen.push_back(static_cast<int>((global * unsign(o.top_k) + k) % unsign(o.num_experts)));
    return chosen;
  }
  if (o.router.selection == Selection::kForcedSkew) return skewed_choice(o, global);
  Vector preference = o.router.order == ScoreOrder::kSelectFirst ? z.noisy : scores_of(o, z.noisy);
  if (balanced.rows > 0) preference = row(balanced, token);
  if (c.training && o.router.noise == Noise::kGumbel) {
    preference = z.noisy;
    for (std::size_t e = 0; e < preference.size(); ++e)
      preference[e] += stream(c, "router/gumbel").gumbel(global, e);
  }
  for (std::size_t e = 0; e < in.bias_E.size(); ++e) preference[e] += in.bias_E[e];
  for (const std::int64_t id : ops::reference::topk(mask_groups(o, preference), o.top_k))
    chosen.push_back(static_cast<int>(id));
  return chosen;
}

// Weights of the chosen before renormalisation.
Vector raw_weights(const MoeOptions& o, const Vector& z, const std::vector<int>& chosen) {
  Vector raw;
  if (o.router.order == ScoreOrder::kSelectFirst && o.router.score == ScoreFunction::kSoftmax) {
    Vector selected;
    for (const int e : chosen) selected.push_back(z[static_cast<std::size_t>(e)]);
    return softmax(selected);
  }
  const Vector scores = scores_of(o, z);
  for (const int e : chosen) raw.push_back(e < 0 ? 0.0 : scores[static_cast<std::size_t>(e)]);
  return raw;
}

Vector over_sum(const Vector& values) {
  const double sum = std::accumulate(values.begin(), values.end(), 0.0);
  Vector result = values;
  for (double& value : result) value = sum == 0.0 ? 0.0 : value / sum;
  return result;
}

void choose_by_experts(const MoeOptions& o, const TokenContext& c, std::vector<TokenRouting>& tokens) {
  const std::int64_t group = o.capacity.group_sequences * c.sequence_length;
  for (TokenRouting& token : tokens) token.chosen.assign(static_cast<std::size_t>(o.num_experts), -1);
  for (std::int64_t begin = 0; begin < c.num_tokens(); begin += group) {
    const auto capacity = std::max<std::int64_t>(
        1,
        static_cast<std::int64_t>(static_cast<double>(group) * std::stod(o.router.expert_choice_factor.text) /
                                      static_cast<double>(o.num_experts) +
                                  1e-9));
    for (std::size_t e = 0; e < static_cast<std::size_t>(o.num_experts); ++e) {
      Vector column;
      for (std::int64_t t = begin; t < begin + group; ++t)
        column.push_back(tokens[static_cast<std::size_t>(t)].probabilities[e]);
      for (const std::int64_t t : ops::reference::topk(column, std::min(capacity, group))) {
        tokens[static_cast<std::size_t>(begin + t)].chosen[e] = static_cast<int>(e);
      }
    }
  }
}

// A slot is kept when fewer than `capacity` slots of its group and expert come before it in the policy's
// order.
void drop(const MoeOptions& o, const TokenContext& c, std::vector<TokenRouting>& tokens) {
  const std::int64_t group = o.capacity.group_sequences * c.sequence_length;
  const double exact = static_cast<double>(group * o.top_k) / static_cast<double>(o.num_experts) *
                       std::stod(o.capacity.factor.text);
  const auto capacity = std::max(static_cast<std::int64_t>(std::ceil(exact - 1e-9)), o.capacity.min_capacity);
  const RandomStream random = stream(c, "capacity/random");
  const auto before = [&](std::int64_t ta, std::int64_t ka, std::int64_t tb, std::int64_t kb) {
    const double wa = tokens[static_cast<std::size_t>(ta)].importance[static_cast<std::size_t>(ka)];
    const double wb = tokens[static_cast<std::size_t>(tb)].importance[static_cast<std::size_t>(kb)];
    switch (o.capacity.drop_policy) {
      case DropPolicy::kPosition:
        return ka != kb ? ka < kb : ta < tb;
      case DropPolicy::kProbability:
        return wa != wb ? wa > wb : (ta != tb ? ta < tb : ka < kb);
      default: {
        const auto slot = [&](std::int64_t t, std::int64_t k) {
          return random.bits(unsign((c.first_token() + t) * o.top_k + k));
        };
        return slot(ta, ka) < slot(tb, kb);
      }
    }
  };
  std::vector<TokenRouting> result = tokens;
  for (std::int64_t t = 0; t < c.num_tokens(); ++t) {
    for (std::int64_t k = 0; k < o.top_k; ++k) {
      auto& me = tokens[static_cast<std::size_t>(t)];
      if (!me.kept[static_cast<std::size_t>(k)]) continue;
      std::int64_t ahead = 0;
      for (std::int64_t u = t / group * group; u < (t / group + 1) * group; ++u) {
        for (std::int64_t j = 0; j < o.top_k; ++j) {
          const auto& other = tokens[static_cast<std::size_t>(u)];
          const bool rival =
              other.kept[static_cast<std::size_t>(j)] &&
              other.chosen[static_cast<std::size_t>(j)] == me.chosen[static_cast<std::size_t>(k)];
          if (rival && (u != t || j != k) && before(u, j, t, k)) ++ahead;
        }
      }
      result[static_cast<std::size_t>(t)].kept[static_cast<std::size_t>(k)] = ahead < capacity;
      result[static_cast<std::size_t>(t)].over_capacity[static_cast<std::size_t>(k)] = ahead >= capacity;
    }
  }
  tokens = std::move(result);
}

void finish(const MoeOptions& o, const TokenContext& c, const std::vector<Vector>& raw,
            std::vector<TokenRouting>& tokens) {
  for (std::size_t t = 0; t < tokens.size(); ++t) {
    TokenRouting& token = tokens[t];
    token.importance = o.router.renormalize == Renormalize::kBeforeDrop ? over_sum(raw[t]) : raw[t];
    for (const int e : token.chosen) token.kept.push_back(e >= 0);
    token.over_capacity.assign(token.chosen.size(), false);
    if (o.router.noise == Noise::kRandomSecondExpert && c.training) {
      const double draw = stream(c, "router/second_expert").uniform(unsign(c.first_token()) + t, 0);
      token.kept[1] = draw < 2.0 * over_sum(raw[t])[1];
    }
  }
  if (o.capacity.drop_policy != DropPolicy::kNone && (c.training || o.capacity.drop_in_evaluation))
    drop(o, c, tokens);
  for (std::size_t t = 0; t < tokens.size(); ++t) {
    TokenRouting& token = tokens[t];
    Vector kept_raw = raw[t];
    for (std::size_t k = 0; k < kept_raw.size(); ++k) {
      if (!token.kept[k]) kept_raw[k] = 0.0;
    }
    token.weights = o.router.renormalize == Renormalize::kAfterDrop ? over_sum(kept_raw) : token.importance;
    for (std::size_t k = 0; k < token.weights.size(); ++k)
      token.weights[k] *= token.kept[k] ? o.router.scaling_factor : 0.0;
  }
}

}  // namespace

std::vector<TokenRouting> route(const MoeOptions& o, const RouterInputs& in, const TokenContext& c) {
  std::vector<Logits> logits;
  std::vector<TokenRouting> tokens(static_cast<std::size_t>(c.num_tokens()));
  for (std::int64_t t = 0; t < c.num_tokens(); ++t) {
    logits.push_back(logits_of(o, in, c, t));
    const Logits& z = logits.back();
    TokenRouting& token = tokens[static_cast<std::size_t>(t)];
    token.probabilities = over_sum(scores_of(o, z.noisy));
    if (!z.deviation.empty()) token.load = smooth_load(z, o.top_k);
    const double top = *std::max_element(z.clean.begin(), z.clean.end());
    for (const double value : z.clean) token.lse += std::exp(value - top);
    token.lse = top + std::log(token.lse);
  }
  const bool balance = c.training && o.router.selection == Selection::kSinkhorn && c.num_tokens() > 0;
  const Matrix balanced = balance ? sinkhorn(o, c, logits) : Matrix();
  if (o.router.selection == Selection::kExpertChoice) choose_by_experts(o, c, tokens);
  std::vector<Vector> raw;
  for (std::int64_t t = 0; t < c.num_tokens(); ++t) {
    TokenRouting& token = tokens[static_cast<std::size_t>(t)];
    if (o.router.selection != Selection::kExpertChoice) token.chosen = choose(o, in, c, logits, t, balanced);
    raw.push_back(raw_weights(o, logits[static_cast<std::size_t>(t)].noisy, token.chosen));
  }
  finish(o, c, raw, tokens);
  return tokens;
}

}  // namespace collegium::moe::reference
