// SPDX-License-Identifier: Apache-2.0
#pragma once

// Expert capacity and who is dropped over it.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>

#include "collegium/moe/options.h"
#include "collegium/moe/routing.h"

namespace collegium::moe {

/// A decimal number held exactly: numerator / 10^digits.
struct Decimal {
  std::int64_t numerator = 0;
  std::int64_t denominator = 1;
};
/// Throws ConfigError naming `path` when the text is not a positive decimal of at most nine digits.
Decimal parse_decimal(const std::string& text, const std::string& path);

/// What     max(ceil(S K / E factor), min_capacity) in integers: S = 100, K = 2, E = 4, factor 1.1 is 55.
/// Ref      [GShard, Sec 2.2] arXiv 2006.16668
std::int64_t expert_capacity(const MoeOptions& options, std::int64_t tokens_per_group);

/// What     How many of a group's `num_tokens` tokens an expert that chooses takes: floor(S c / E) in
///          integers, at least one where there is one, at most all.
/// Ref      [Zhou2022, Sec 3.1] arXiv 2202.09368
std::int64_t expert_choice_capacity(const MoeOptions& options, std::int64_t num_tokens);

/// What     How many experts compute a token: top_k, where experts choose c = expert_choice_factor on average
///          (at most all; the rounding of expert_choice_capacity() not counted).
double experts_per_token(const MoeOptions& options);

/// What     Which slots stay when every expert takes at most its capacity of each group of whole sequences.
///          position: all first choices in token order, then all second ones; probability: highest weight
///          first, ties to the earlier slot; random: a random order of the group's slots.
/// Shape    ids_TK int32 (-1 = no expert), weights_TK -> bool [T, K], false also where there is no expert.
/// Throws   ConfigError when a group straddles two ranks: first_sequence and num_sequences must be
///          multiples of its size.
at::Tensor kept_slots(const MoeOptions& options, const at::Tensor& ids_TK, const at::Tensor& weights_TK,
                      const TokenContext& context);

}  // namespace collegium::moe
