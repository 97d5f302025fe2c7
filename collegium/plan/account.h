// SPDX-License-Identifier: Apache-2.0
#pragma once

// The exact account of a model: parameters by component, in total and active per token, and FLOPs of a token.

#include <cstdint>
#include <string>
#include <vector>

#include "collegium/plan/model_spec.h"

namespace collegium::plan {

/// One component over all layers, in parameters.
struct AccountLine {
  std::string component;
  std::string formula;  ///< how the number comes about, in the model's own sizes
  std::int64_t total = 0;
  std::int64_t active = 0;  ///< what one token passes through
};

/// What     Parameters of a model. Buffers that are not trained by gradients are kept apart.
struct Account {
  std::vector<AccountLine> lines;
  std::int64_t total = 0;
  std::int64_t active = 0;                    ///< input embedding and output head included
  std::int64_t active_without_embedding = 0;  ///< input embedding (one row of it is read per token) left out
  std::int64_t shared = 0;          ///< every token passes through these: all but the routed experts
  std::int64_t routed = 0;          ///< all routed experts
  std::int64_t selection_bias = 0;  ///< numbers of the loss-free balance bias, no parameters
  std::int64_t mtp = 0;             ///< multi-token prediction, apart from `total`
};

/// What     Counts every component. A tied embedding is counted once, as the embedding, and is active as
///          the head.
Account account(const ModelSpec& model);

/// What     FLOPs of the forward pass of one token, by part.
/// Math     2 x weights of the matrices it passes through, and for attention 2 * H * (d_qk + d_v) * keys,
///          where keys = seq/2 on average under a causal mask (at most the window in windowed layers).
struct TokenFlops {
  double attention_projections = 0.0;
  double attention_scores = 0.0;
  double dense_ffn = 0.0;
  double experts = 0.0;
  double router = 0.0;
  double head = 0.0;
  double mtp = 0.0;  ///< multi-token prediction: its layers and their use of the head
  double total() const;
};
/// What     FLOPs of a token's forward pass at a sequence length.
TokenFlops forward_flops_per_token(const ModelSpec& model, double seq_len);

/// What     Keys that a query sees on average: causal (seq+1)/2, or less under a window, or `seq` when not
///          causal.
double mean_visible_keys(double seq_len, std::int64_t window);

/// What     The account as lines of text, a figure and its formula each, with what often-quoted figures
///          leave out.
std::string format_account(const ModelSpec& model, const Account& counts, double seq_len);
/// The same for a program.
Json account_json(const ModelSpec& model, const Account& counts, double seq_len);

/// What     12345678 as "12,345,678".
std::string format_integer(std::int64_t value);

}  // namespace collegium::plan
