// SPDX-License-Identifier: Apache-2.0
#pragma once

// Tokens to the ranks that hold their experts, each at most once per rank however many of its experts live
// there, and sums per token back. two_level uses it between nodes and again within a node.
//
// Letters here: M ranks of the group, C copies that this rank sends, U copies that it receives, N (token,
// choice) pairs that travel with them.

#include <ATen/core/Tensor.h>

#include <memory>
#include <span>
#include <vector>

#include "collegium/comm/communicator.h"
#include "collegium/moe/exchange.h"

namespace collegium::moe {

/// Where the copies of one chunk of tokens go. Copies lie by rank on both sides, in token order within one.
/// A direct plan holds ids and num_tokens only.
struct CopyPlan {
  bool direct = false;          ///< a group of one rank: the tokens themselves stand for their copies
  at::Tensor copy_token_C;      ///< int32: token of each copy
  at::Tensor slot_copy_TM;      ///< int32: copy of each (token, rank), -1 = none
  RowCounts copies;             ///< of the way out
  at::Tensor pair_slot_N;       ///< int32: t K + k of each pair that is sent, in (rank, token, choice) order
  RowCounts pairs;              ///< of the way out
  at::Tensor received_slot_N;   ///< int64: u K + k of each pair that is received
  at::Tensor received_ids_UK;   ///< int32: experts of the received copies that live here, -1 elsewhere
  std::int64_t num_tokens = 0;  ///< T
};

class CopyExchange {
 public:
  /// `rank_of_expert[e]` is the rank of `group` that expert e is reached through, -1 = not from here.
  CopyExchange(std::shared_ptr<comm::Communicator> group, std::vector<int> rank_of_expert);

  /// What     The copies of every chunk, with the only exchange of counts and expert ids.
  /// Shape    int32 [T, K] each, -1 = no expert.
  /// Comm     two all_to_alls for all chunks together; waits for the group.
  std::vector<CopyPlan> plan(std::span<const at::Tensor> chunk_ids_TK) const;

  /// What     Starts sending a row per copy.
  /// Shape    x_TD [T, D] -> received [U, D].
  /// Dtype    any.
  Exchange send_rows(const at::Tensor& x_TD, const CopyPlan& plan) const;
  /// What     Starts sending a weight per pair; arrived_weights() puts what arrives at its slots.
  /// Shape    weights_TK [T, K] -> received [N].
  /// Dtype    any.
  Exchange send_weights(const at::Tensor& weights_TK, const CopyPlan& plan) const;
  /// Shape    [N] -> [U, K], zero at experts that do not live here. Direct: [T, K] as it is.
  /// Dtype    any.
  static at::Tensor arrived_weights(const at::Tensor& weights_N, const CopyPlan& plan);

  /// What     Starts the way back of a row per received copy; summed_rows() adds what arrives per token.
  /// Shape    rows_UD [U, D] -> received [C, D].
  /// Dtype    any.
  Exchange return_rows(const at::Tensor& rows_UD, const CopyPlan& plan) const;
  /// Shape    [C, D] -> [T, D].
  /// Dtype    added in fp32 (fp64 for fp64), in rank order, and rounded once.
  static at::Tensor summed_rows(const at::Tensor& rows_CD, const CopyPlan& plan);
  /// What     Starts the way back of a value per pair; returned_weights() puts what arrives at its slots.
  /// Shape    values_UK [U, K] -> received [N].
  /// Dtype    any.
  Exchange return_weights(const at::Tensor& values_UK, const CopyPlan& plan) const;
  /// Shape    [N] -> [T, K], zero at slots that went nowhere.
  /// Dtype    any.
  static at::Tensor returned_weights(const at::Tensor& values_N, const CopyPlan& plan);

 private:
  void choose_copies(const at::Tensor& ids_TK, CopyPlan& plan) const;
  void exchange_counts(std::span<CopyPlan> plans) const;
  void exchange_ids(std::span<const at::Tensor> chunk_ids_TK, std::span<CopyPlan> plans) const;

  std::shared_ptr<comm::Communicator> group_;
  std::vector<int> rank_of_expert_;
};

}  // namespace collegium::moe
