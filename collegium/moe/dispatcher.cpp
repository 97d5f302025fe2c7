// SPDX-License-Identifier: Apache-2.0
#include "collegium/moe/dispatcher.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <map>

#include "collegium/base/error.h"

namespace collegium::moe {

at::Tensor Dispatcher::result_rows(const at::Tensor& like, const std::shared_ptr<DispatchHandle>& handle) {
  return at::empty({handle->row_counts_L.sum().item<std::int64_t>(), like.size(1)}, like.options());
}

bool nodes_are_even(std::span<const int> nodes) {
  std::map<int, int> sizes;
  for (const int node : nodes) ++sizes[node];
  return std::all_of(sizes.begin(), sizes.end(),
                     [&](const auto& size) { return size.second == sizes.begin()->second; });
}

std::shared_ptr<Dispatcher> make_dispatcher(const DispatcherOptions& options, std::int64_t num_experts,
                                            const std::shared_ptr<comm::Communicator>& ep) {
  if (ep->size() == 1) return make_local_dispatcher(num_experts);
  const ExpertPlacement placement{.num_experts = num_experts, .num_ranks = ep->size()};
  switch (options.kind) {
    case DispatcherKind::kUneven:
      return make_uneven_dispatcher(placement, ep);
    case DispatcherKind::kPadded:
      return make_padded_dispatcher(placement, ep);
    case DispatcherKind::kAllgather:
      return make_allgather_dispatcher(placement, ep, options.combine_fp32);
    case DispatcherKind::kTwoLevel:
      return make_two_level_dispatcher(placement, ep, options.combine_fp32);
    case DispatcherKind::kSharedMemory:
      return make_shared_memory_dispatcher(placement, ep);
  }
  throw InternalError("unknown dispatcher");
}

}  // namespace collegium::moe
