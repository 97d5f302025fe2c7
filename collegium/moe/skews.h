// SPDX-License-Identifier: Apache-2.0
#pragma once

// Routings for benchmarks: what a router might do to the ranks, from perfect balance to the worst. A pure
// function of step and global token index, so every layout routes the same tokens alike.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "collegium/base/fields.h"
#include "collegium/moe/placement.h"

namespace collegium::moe {

/// The shares are of all T K slots; "balanced" hands experts to slots in turns: expert (t K + k) mod E.
enum class Skew {
  /// W0. Every expert gets 1/E.
  kBalanced,
  /// W1. Expert 0 is chosen by every second token, so it gets 1/(2 K), E/(2 K) times the mean; the other
  /// slots are balanced over the other experts.
  kHotExperts,
  /// W2. Of four tokens three choose among the first rank's experts only (as many choices as it has experts;
  /// the rest is balanced over the other ranks'), the fourth is balanced: with at least K experts per rank
  /// the first rank gets 3/4 + 1/(4 ranks).
  kHotRank,
  /// W3. Every second token chooses the first experts of min(K, ranks) ranks, in turns; the other slots are
  /// balanced over the other experts. Experts differ in load (unless E = 2 max(K, ranks)), ranks do not.
  kSpreadHot,
  /// W4. Balanced over the experts, but the ranks bring unequal numbers of tokens: rank r of R brings
  /// (2 r + 1) / R^2 of them.
  kRaggedSource,
  /// W5. The last rank's experts (on one rank: the upper half) get nothing; the others are balanced.
  kZeroLoad,
  /// W6. W1 whose hot expert is expert (step mod E).
  kRotating,
  /// W7. On every fourth step all tokens choose experts 0 .. K-1; on the others they are balanced.
  kBurst,
};

struct SkewShape {
  std::int64_t num_experts = 8;
  std::int64_t top_k = 2;
  int num_ranks = 1;  ///< that share the experts
};

/// What     How many of `num_tokens` each rank brings; they sum to num_tokens. Even but for W4.
std::vector<std::int64_t> skewed_shares(Skew skew, std::int64_t num_tokens, int num_ranks);

/// What     The experts of tokens [first_token, first_token + num_tokens) of the global batch, to be
///          replayed.
/// Shape    int32 [T, K], the experts of a token differ.
/// Throws   ConfigError: fewer experts are left than a token chooses.
at::Tensor skewed_ids_TK(Skew skew, const SkewShape& shape, std::int64_t step, std::int64_t first_token,
                         std::int64_t num_tokens);

/// What     K different experts per token, every set as likely as any other.
/// Shape    int32 [T, K].
at::Tensor random_ids_TK(const SkewShape& shape, std::int64_t step, std::int64_t first_token,
                         std::int64_t num_tokens);

}  // namespace collegium::moe

namespace collegium {
template <>
struct EnumNames<moe::Skew> {
  static constexpr std::pair<std::string_view, moe::Skew> names[] = {
      {"W0", moe::Skew::kBalanced},  {"W1", moe::Skew::kHotExperts},   {"W2", moe::Skew::kHotRank},
      {"W3", moe::Skew::kSpreadHot}, {"W4", moe::Skew::kRaggedSource}, {"W5", moe::Skew::kZeroLoad},
      {"W6", moe::Skew::kRotating},  {"W7", moe::Skew::kBurst}};
};
}  // namespace collegium
