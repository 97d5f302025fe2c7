// SPDX-License-Identifier: Apache-2.0
#pragma once

// What `collegium verify` runs: layouts, a small model with everything switched on, and option sets in which
// every pair of choices meets.

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "collegium/train/run_config.h"

namespace collegium::train {

/// One way to lay a run out over the ranks.
struct Layout {
  int ep = 1;
  moe::DispatcherKind dispatcher = moe::DispatcherKind::kUneven;
  bool overlap = false;  ///< everything that can overlap does

  std::string name() const;  ///< "ep 4, two_level, overlap"
};

/// What     Every ep that divides the ranks and has experts, with every dispatcher, without and with overlap.
///          two_level only where every expert-parallel group has as many ranks on each of its nodes,
///          shared_memory only where it is on one node.
/// Shape    nodes: of every world rank.
std::vector<Layout> list_layouts(const std::vector<int>& nodes, std::int64_t num_experts);

/// What     The run under a layout; what it computes stays the same.
RunConfig with_layout(RunConfig config, const Layout& layout);

/// What     A corpus of two domains (counting up, counting down), written to `folder`.
void write_verification_corpus(const std::filesystem::path& folder);

/// What     Three layers (one dense), 11 experts (a number that few sizes divide), noise, capacity with
///          drops, a shared expert, loss-free bias and losses of every scope, float64.
RunConfig verification_run(const std::filesystem::path& folder);

/// One option set that differs from verification_run().
struct OptionCase {
  std::string name;  ///< "gumbel, sinkhorn, drop position, ..."
  RunConfig config;
};
/// What     Option sets, each with a layout of `layouts`, in which every pair of choices of two options
///          (layout included) that may stand together does so at least once.
/// Order    Deterministic.
std::vector<OptionCase> pairwise_cases(const std::filesystem::path& folder,
                                       const std::vector<Layout>& layouts);

/// What     Rows of choices, choices[i] in [0, sizes[i]), that hold every pair which some valid row holds.
std::vector<std::vector<std::size_t>> pairwise_rows(
    const std::vector<std::size_t>& sizes, const std::function<bool(const std::vector<std::size_t>&)>& valid);

}  // namespace collegium::train
