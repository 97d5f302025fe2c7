// SPDX-License-Identifier: Apache-2.0
#pragma once

// Dispatchers with the groups of ranks that they are tested on.

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "collegium/comm/local/local.h"
#include "collegium/moe/dispatcher.h"

namespace collegium::test {

struct DispatcherLayout {
  moe::DispatcherOptions options;
  int ranks = 1;
  int ranks_per_node = 0;  ///< 0 = one node

  std::string name() const {
    return fmt::format("{}{}_{}_ranks_{}", enum_name(options.kind), options.combine_fp32 ? "_fp32" : "",
                       ranks,
                       ranks_per_node == 0 ? "1_node" : fmt::format("{}_nodes", ranks / ranks_per_node));
  }
};

inline std::string layout_name(const testing::TestParamInfo<DispatcherLayout>& info) {
  return info.param.name();
}

inline std::vector<DispatcherLayout> flat_layouts(std::initializer_list<int> numbers_of_ranks) {
  std::vector<DispatcherLayout> layouts;
  for (const int ranks : numbers_of_ranks) {
    for (const auto& [name, kind] : EnumNames<moe::DispatcherKind>::names) {
      if (kind != moe::DispatcherKind::kTwoLevel)  // has its own, with nodes
        layouts.push_back({.options = {.kind = kind}, .ranks = ranks});
    }
  }
  return layouts;
}

inline std::vector<DispatcherLayout> all_layouts() {
  std::vector<DispatcherLayout> layouts = flat_layouts({1, 2, 3, 4, 7});
  using moe::DispatcherKind;
  layouts.push_back({.options = {.kind = DispatcherKind::kAllgather, .combine_fp32 = true}, .ranks = 3});
  layouts.push_back({.options = {.kind = DispatcherKind::kTwoLevel}, .ranks = 1});
  layouts.push_back({.options = {.kind = DispatcherKind::kTwoLevel, .combine_fp32 = true},
                     .ranks = 4,
                     .ranks_per_node = 2});
  for (const auto& [ranks, per_node] : {std::pair{4, 4}, {4, 2}, {4, 1}, {6, 2}, {8, 2}})
    layouts.push_back(
        {.options = {.kind = DispatcherKind::kTwoLevel}, .ranks = ranks, .ranks_per_node = per_node});
  return layouts;
}

/// The dispatcher itself also where one rank would do without.
inline std::shared_ptr<moe::Dispatcher> make_dispatcher_of(const moe::DispatcherOptions& options,
                                                           std::int64_t num_experts,
                                                           const std::shared_ptr<comm::Communicator>& ep) {
  const moe::ExpertPlacement placement{.num_experts = num_experts, .num_ranks = ep->size()};
  switch (options.kind) {
    case moe::DispatcherKind::kUneven:
      return moe::make_uneven_dispatcher(placement, ep);
    case moe::DispatcherKind::kPadded:
      return moe::make_padded_dispatcher(placement, ep);
    case moe::DispatcherKind::kAllgather:
      return moe::make_allgather_dispatcher(placement, ep, options.combine_fp32);
    case moe::DispatcherKind::kTwoLevel:
      return moe::make_two_level_dispatcher(placement, ep, options.combine_fp32);
    case moe::DispatcherKind::kSharedMemory:
      return moe::make_shared_memory_dispatcher(placement, ep);
  }
  return nullptr;
}

/// Runs fn(ep) on every rank of the layout. With one OpenMP thread each: ranks are threads already.
inline void run_layout(const DispatcherLayout& layout,
                       const std::function<void(const std::shared_ptr<comm::Communicator>&)>& fn) {
  comm::run_ranks(layout.ranks, [&](comm::Communicator& world) { fn(world.shared_from_this()); },
                  {.ranks_per_node = layout.ranks_per_node});
}

}  // namespace collegium::test
