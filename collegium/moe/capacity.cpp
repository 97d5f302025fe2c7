// SPDX-License-Identifier: Apache-2.0
#include "collegium/moe/capacity.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "collegium/base/error.h"
#include "collegium/base/rng.h"

namespace collegium::moe {

namespace {

// Slots [begin, end), the smallest key first, ties to the earlier slot.
template <class KeyOf>
std::vector<std::int64_t> sorted_slots(std::int64_t begin, std::int64_t end, const KeyOf& key_of) {
  std::vector<std::pair<decltype(key_of(begin)), std::int64_t>> keyed;
  keyed.reserve(static_cast<std::size_t>(end - begin));
  for (std::int64_t slot = begin; slot < end; ++slot) keyed.emplace_back(key_of(slot), slot);
  std::sort(keyed.begin(), keyed.end());
  std::vector<std::int64_t> slots;
  slots.reserve(keyed.size());
  for (const auto& [key, slot] : keyed) slots.push_back(slot);
  return slots;
}

// The order in which the slots of tokens [begin, end) ask for a place.
std::vector<std::int64_t> slot_order(DropPolicy policy, std::int64_t begin, std::int64_t end,
                                     std::int64_t top_k, const double* weights, const TokenContext& context) {
  if (policy == DropPolicy::kPosition) {
    std::vector<std::int64_t> order;
    order.reserve(static_cast<std::size_t>((end - begin) * top_k));
    for (std::int64_t k = 0; k < top_k; ++k) {
      for (std::int64_t token = begin; token < end; ++token) order.push_back(token * top_k + k);
    }
    return order;
  }
  if (policy == DropPolicy::kProbability) {
    // A weight that is not a number is the lowest: a comparison with it would be no order.
    return sorted_slots(begin * top_k, end * top_k, [&](std::int64_t slot) {
      return std::isnan(weights[slot]) ? std::numeric_limits<double>::infinity() : -weights[slot];
    });
  }
  const RandomStream stream(context.seed, "capacity/random", static_cast<std::uint64_t>(context.step),
                            static_cast<std::uint64_t>(context.layer));
  return sorted_slots(begin * top_k, end * top_k, [&](std::int64_t slot) {
    return stream.bits(static_cast<std::uint64_t>(context.first_token() * top_k + slot));
  });
}

}  // namespace

Decimal parse_decimal(const std::string& text, const std::string& path) {
  constexpr int kMaxDigits = 9;
  Decimal decimal;
  int digits = 0;
  bool point = false;
  bool ok = !text.empty();
  for (const char c : text) {
    if (c == '.' && !point) {
      point = true;
    } else if (c >= '0' && c <= '9' && digits < kMaxDigits) {
      ++digits;
      decimal.numerator = decimal.numerator * 10 + (c - '0');
      if (point) decimal.denominator *= 10;
    } else {
      ok = false;
    }
  }
  require_config(ok && decimal.numerator > 0,
                 "{} = \"{}\": must be a positive decimal number of at most {} digits, such as \"1.25\"",
                 path, text, kMaxDigits);
  return decimal;
}

std::int64_t expert_capacity(const MoeOptions& options, std::int64_t tokens_per_group) {
  const Decimal factor = parse_decimal(options.capacity.factor.text, "capacity.factor");
  // 128 bits: S K can reach 2^40, the numerator 2^30.
  const auto numerator = static_cast<__int128>(tokens_per_group) * options.top_k * factor.numerator;
  const auto denominator = static_cast<__int128>(options.num_experts) * factor.denominator;
  const auto capacity = static_cast<std::int64_t>((numerator + denominator - 1) / denominator);
  return std::max(capacity, options.capacity.min_capacity);
}

std::int64_t expert_choice_capacity(const MoeOptions& options, std::int64_t num_tokens) {
  const Decimal factor = parse_decimal(options.router.expert_choice_factor.text, "expert_choice_factor");
  const auto wanted = static_cast<__int128>(num_tokens) * factor.numerator /
                      (static_cast<__int128>(options.num_experts) * factor.denominator);
  return static_cast<std::int64_t>(
      std::clamp<__int128>(wanted, std::min<std::int64_t>(1, num_tokens), num_tokens));
}

double experts_per_token(const MoeOptions& options) {
  if (options.router.selection != Selection::kExpertChoice) return static_cast<double>(options.top_k);
  const Decimal factor = parse_decimal(options.router.expert_choice_factor.text, "expert_choice_factor");
  return std::min(static_cast<double>(factor.numerator) / static_cast<double>(factor.denominator),
                  static_cast<double>(options.num_experts));
}

at::Tensor kept_slots(const MoeOptions& options, const at::Tensor& ids_TK, const at::Tensor& weights_TK,
                      const TokenContext& context) {
  const std::int64_t group_sequences = options.capacity.group_sequences;
  require_config(
      context.first_sequence % group_sequences == 0 && context.num_sequences % group_sequences == 0,
      "capacity.group_sequences = {}: a group must lie on one rank within one micro-step, but this rank "
      "holds "
      "{} sequences from number {}",
      group_sequences, context.num_sequences, context.first_sequence);
  const at::Tensor ids_cpu = ids_TK.cpu().contiguous();
  const at::Tensor weights_cpu = weights_TK.detach().cpu().to(at::kDouble).contiguous();
  at::Tensor kept_TK = at::zeros_like(ids_cpu, at::kBool);
  const auto* ids = ids_cpu.const_data_ptr<std::int32_t>();
  auto* kept = kept_TK.mutable_data_ptr<bool>();
  const std::int64_t top_k = ids_cpu.size(1);
  const std::int64_t group_tokens = group_sequences * context.sequence_length;
  const std::int64_t capacity = expert_capacity(options, group_tokens);
  for (std::int64_t begin = 0; begin < ids_cpu.size(0); begin += group_tokens) {
    std::vector<std::int64_t> used(static_cast<std::size_t>(options.num_experts), 0);
    for (const std::int64_t slot : slot_order(options.capacity.drop_policy, begin, begin + group_tokens,
                                              top_k, weights_cpu.const_data_ptr<double>(), context)) {
      if (ids[slot] < 0) continue;
      std::int64_t& places = used[static_cast<std::size_t>(ids[slot])];
      kept[slot] = places < capacity;
      if (kept[slot]) ++places;
    }
  }
  return kept_TK.to(ids_TK.device());
}

}  // namespace collegium::moe
