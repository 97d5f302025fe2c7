// SPDX-License-Identifier: Apache-2.0
#include "collegium/cli/bench_traffic.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <set>
#include <span>

#include "collegium/base/error.h"

namespace collegium::cli {

namespace {

// One rank's bytes to another; which way an arrow goes is the caller's.
class Books {
 public:
  explicit Books(const TrafficShape& shape) : shape_(shape), bytes_(shape.members.size()) {}

  // What goes out with `out` rows and `weights` weights from one rank to another comes home the same way.
  void add_round_trip(std::size_t from, std::size_t to, std::int64_t rows, std::int64_t pairs) {
    const std::int64_t weights = pairs * shape_.weight_bytes;
    add(from, to, 0, rows * shape_.row_bytes + weights);
    add(to, from, 1, rows * shape_.sum_bytes);
    add(from, to, 2, rows * shape_.row_bytes);
    add(to, from, 3, rows * shape_.sum_bytes + weights);
  }
  // All ranks tell each other that rows, and weights, are where they can be read.
  void add_meetings() {
    constexpr std::int64_t kNumber = 8;
    constexpr std::array<std::int64_t, kArrows.size()> kNumbers = {2, 1, 1, 2};
    for (std::size_t from = 0; from < bytes_.size(); ++from) {
      for (std::size_t to = 0; to < bytes_.size(); ++to) {
        for (std::size_t arrow = 0; arrow < kArrows.size(); ++arrow)
          add(from, to, arrow, kNumbers.at(arrow) * kNumber * shape_.chunks);
      }
    }
  }
  std::vector<LayerBytes> take() { return std::move(bytes_); }

 private:
  void add(std::size_t from, std::size_t to, std::size_t arrow, std::int64_t bytes) {
    if (from == to) return;
    const bool same_node = shape_.members[from].node == shape_.members[to].node;
    ArrowBytes& sent = bytes_[from][arrow];
    (same_node ? sent.within_nodes : sent.between_nodes) += bytes;
  }

  const TrafficShape& shape_;
  std::vector<LayerBytes> bytes_;
};

moe::ExpertPlacement placement_of(const TrafficShape& shape) {
  return {.num_experts = shape.num_experts, .num_ranks = static_cast<int>(shape.members.size())};
}

std::span<const std::int32_t> ids_of(const at::Tensor& ids_TK) {
  return {ids_TK.const_data_ptr<std::int32_t>(), static_cast<std::size_t>(ids_TK.numel())};
}

void add_uneven(const TrafficShape& shape, const std::vector<at::Tensor>& ids_TK, Books& books) {
  const moe::ExpertPlacement placement = placement_of(shape);
  for (std::size_t rank = 0; rank < ids_TK.size(); ++rank) {
    std::vector<std::int64_t> rows(ids_TK.size(), 0);
    for (const std::int32_t id : ids_of(ids_TK[rank])) {
      if (id >= 0) ++rows[static_cast<std::size_t>(placement.rank_of(id))];
    }
    for (std::size_t to = 0; to < rows.size(); ++to) books.add_round_trip(rank, to, rows[to], rows[to]);
  }
}

void add_padded(const TrafficShape& shape, const std::vector<at::Tensor>& ids_TK, Books& books) {
  const moe::ExpertPlacement placement = placement_of(shape);
  for (std::int64_t chunk = 0; chunk < shape.chunks; ++chunk) {
    std::int64_t block = 0;
    for (const at::Tensor& ids : ids_TK) {
      const std::int64_t begin = ids.size(0) * chunk / shape.chunks;
      const std::int64_t end = ids.size(0) * (chunk + 1) / shape.chunks;
      std::vector<std::int64_t> counts(static_cast<std::size_t>(shape.num_experts), 0);
      for (const std::int32_t id : ids_of(ids.narrow(0, begin, end - begin))) {
        if (id >= 0) ++counts[static_cast<std::size_t>(id)];
      }
      block = std::max(block, *std::max_element(counts.begin(), counts.end()));
    }
    for (std::size_t from = 0; from < ids_TK.size(); ++from) {
      for (std::size_t to = 0; to < ids_TK.size(); ++to) {
        const std::int64_t rows = block * placement.count(static_cast<int>(to));
        books.add_round_trip(from, to, rows, rows);
      }
    }
  }
}

void add_allgather(const std::vector<at::Tensor>& ids_TK, Books& books) {
  for (std::size_t from = 0; from < ids_TK.size(); ++from) {
    for (std::size_t to = 0; to < ids_TK.size(); ++to)
      books.add_round_trip(from, to, ids_TK[from].size(0), ids_TK[from].numel());
  }
}

// The rank of each node through which a rank reaches it: the one with its own place among the node's ranks.
class Gateways {
 public:
  explicit Gateways(const TrafficShape& shape) {
    for (std::size_t rank = 0; rank < shape.members.size(); ++rank) {
      std::vector<std::size_t>& ranks = ranks_of_node_[shape.members[rank].node];
      place_.push_back(ranks.size());
      ranks.push_back(rank);
    }
  }
  std::size_t at(int node, std::size_t source) const { return ranks_of_node_.at(node).at(place_[source]); }

 private:
  std::map<int, std::vector<std::size_t>> ranks_of_node_;
  std::vector<std::size_t> place_;
};

void add_two_level(const TrafficShape& shape, const std::vector<at::Tensor>& ids_TK, Books& books) {
  const moe::ExpertPlacement placement = placement_of(shape);
  const Gateways gateways(shape);
  for (std::size_t source = 0; source < ids_TK.size(); ++source) {
    const std::span<const std::int32_t> ids = ids_of(ids_TK[source]);
    const auto top_k = static_cast<std::size_t>(ids_TK[source].size(1));
    for (std::size_t slot = 0; slot < ids.size(); slot += top_k) {
      std::map<std::size_t, std::int64_t> pairs_of_rank;
      std::map<int, std::int64_t> pairs_of_node;
      for (const std::int32_t id : ids.subspan(slot, top_k)) {
        if (id < 0) continue;
        const auto rank = static_cast<std::size_t>(placement.rank_of(id));
        ++pairs_of_rank[rank];
        ++pairs_of_node[shape.members[rank].node];
      }
      for (const auto& [node, pairs] : pairs_of_node)
        books.add_round_trip(source, gateways.at(node, source), 1, pairs);
      for (const auto& [rank, pairs] : pairs_of_rank)
        books.add_round_trip(gateways.at(shape.members[rank].node, source), rank, 1, pairs);
    }
  }
}

double log_choose(double n, double k) {
  return std::lgamma(n + 1.0) - std::lgamma(k + 1.0) - std::lgamma(n - k + 1.0);
}

}  // namespace

std::vector<LayerBytes> expected_bytes(const TrafficShape& shape, const std::vector<at::Tensor>& ids_TK) {
  Books books(shape);
  if (ids_TK.size() == 1) return books.take();
  switch (shape.dispatcher.kind) {
    case moe::DispatcherKind::kUneven:
      add_uneven(shape, ids_TK, books);
      break;
    case moe::DispatcherKind::kPadded:
      add_padded(shape, ids_TK, books);
      break;
    case moe::DispatcherKind::kAllgather:
      add_allgather(ids_TK, books);
      break;
    case moe::DispatcherKind::kTwoLevel:
      add_two_level(shape, ids_TK, books);
      break;
    case moe::DispatcherKind::kSharedMemory:
      books.add_meetings();
      break;
  }
  return books.take();
}

LayerBytes counted_bytes(const comm::Ledger& ledger) {
  LayerBytes counted;
  for (std::size_t arrow = 0; arrow < kArrows.size(); ++arrow) {
    const comm::LedgerEntry sum =
        ledger.sum([&](const comm::LedgerKey& key) { return key.phase == kArrows[arrow]; });
    counted[arrow] = {.within_nodes = sum.bytes_within_nodes, .between_nodes = sum.bytes_between_nodes};
  }
  return counted;
}

std::int64_t remote_copies(const TrafficShape& shape, const std::vector<at::Tensor>& ids_TK) {
  const moe::ExpertPlacement placement = placement_of(shape);
  std::int64_t copies = 0;
  for (std::size_t source = 0; source < ids_TK.size(); ++source) {
    const std::span<const std::int32_t> ids = ids_of(ids_TK[source]);
    const auto top_k = static_cast<std::size_t>(ids_TK[source].size(1));
    for (std::size_t slot = 0; slot < ids.size(); slot += top_k) {
      std::set<int> nodes;
      for (const std::int32_t id : ids.subspan(slot, top_k)) {
        if (id >= 0) nodes.insert(shape.members[static_cast<std::size_t>(placement.rank_of(id))].node);
      }
      nodes.erase(shape.members[source].node);
      copies += static_cast<std::int64_t>(nodes.size());
    }
  }
  return copies;
}

double expected_remote_copies(std::int64_t num_experts, std::int64_t top_k, std::int64_t num_nodes) {
  const auto e = static_cast<double>(num_experts);
  const auto k = static_cast<double>(top_k);
  const auto g = static_cast<double>(num_nodes);
  const double elsewhere = e - e / g;
  const double misses = elsewhere < k ? 0.0 : std::exp(log_choose(elsewhere, k) - log_choose(e, k));
  return g * (1.0 - misses) * (1.0 - 1.0 / g);
}

}  // namespace collegium::cli
