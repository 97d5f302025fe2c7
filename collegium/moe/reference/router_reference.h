// SPDX-License-Identifier: Apache-2.0
#pragma once

// The oracle of router, capacity and balance losses: plain loops over tokens in double precision, written
// from the formulas and not from the kernels. It shares only the random streams with them, so that noise is
// the same.

#include <map>
#include <string>
#include <vector>

#include "collegium/moe/options.h"
#include "collegium/moe/routing.h"
#include "collegium/ops/reference/reference.h"

namespace collegium::moe::reference {

using ops::reference::Matrix;

/// What became of one token.
struct TokenRouting {
  std::vector<int> chosen;            ///< K experts in order of preference, -1 = none
  std::vector<bool> kept;             ///< K
  std::vector<bool> over_capacity;    ///< K, not kept for want of a place
  std::vector<double> weights;        ///< K, 0 where dropped
  std::vector<double> importance;     ///< K, before any drop and the scaling factor
  std::vector<double> probabilities;  ///< E, summing to 1
  std::vector<double> load;           ///< E, smooth load; empty without learned noise
  double lse = 0.0;                   ///< logsumexp of the clean logits
};

struct RouterInputs {
  Matrix x_TD;
  Matrix gate_ED;
  Matrix noise_ED;             ///< empty without learned noise
  std::vector<double> bias_E;  ///< empty without loss-free balancing
};

/// What     The decision for every token (no padding).
std::vector<TokenRouting> route(const MoeOptions& options, const RouterInputs& inputs,
                                const TokenContext& context);

/// What     Every loss of one layer without its coefficient, by option name, and "hf_pooled" of this layer
///          alone.
std::map<std::string, double> losses(const MoeOptions& options, const std::vector<TokenRouting>& tokens,
                                     const TokenContext& context);

}  // namespace collegium::moe::reference
