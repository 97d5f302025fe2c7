// SPDX-License-Identifier: Apache-2.0
// Bytes of the four arrows of our own MoE layer.
#include <algorithm>
#include <cmath>
#include <map>
#include <set>

#include "collegium/base/error.h"
#include "collegium/plan/own_run.h"

namespace collegium::plan {

namespace {

// Consecutive experts per rank, the first ranks hold one more.
struct Placement {
  std::int64_t experts = 0;
  int ranks = 1;
  std::int64_t first(int rank) const {
    return rank * (experts / ranks) + std::min<std::int64_t>(rank, experts % ranks);
  }
  std::int64_t count(int rank) const { return first(rank + 1) - first(rank); }
  int rank_of(std::int64_t expert) const {
    int rank = 0;
    while (first(rank + 1) <= expert) ++rank;
    return rank;
  }
};

double element_bytes(const std::string& dtype) {
  if (dtype == "bfloat16") return 2.0;
  if (dtype == "float32") return 4.0;
  require_config(dtype == "float64", "dtype = {}: must be bfloat16, float32 or float64", dtype);
  return 8.0;
}

// What goes out with rows and (token, expert) pairs from one rank to another comes home the same way, and
// both again in the backward pass.
class Books {
 public:
  Books(const OwnRun& run, int first_rank)
      : run_(run),
        first_rank_(first_rank),
        row_(static_cast<double>(run.model.hidden) * element_bytes(run.dtype)),
        weight_(std::max(4.0, element_bytes(run.dtype))),
        bytes_(static_cast<std::size_t>(run.ep)) {
    const bool may_widen = run.exchange == Exchange::kTwoLevel || run.exchange == Exchange::kAllgather;
    sum_ = may_widen && run.combine_fp32 ? static_cast<double>(run.model.hidden) * weight_ : row_;
  }

  int node(int rank) const {
    const auto place = static_cast<std::size_t>(first_rank_) + static_cast<std::size_t>(rank);
    return run_.node_of_rank.empty() ? 0 : run_.node_of_rank.at(place);
  }
  void round_trip(int from, int to, double rows, double pairs) {
    add(from, to, 0, rows * row_ + pairs * weight_);
    add(to, from, 1, rows * sum_);
    add(from, to, 2, rows * row_);
    add(to, from, 3, rows * sum_ + pairs * weight_);
  }
  // Ranks tell each other that their rows are there: a number for rows, another for weights.
  void meet(int from, int to) {
    constexpr double kNumber = 8.0;
    const auto chunks = static_cast<double>(run_.chunks);
    for (const auto& [arrow, numbers] : {std::pair{0U, 2.0}, {1U, 1.0}, {2U, 1.0}, {3U, 2.0}})
      add(from, to, arrow, numbers * kNumber * chunks);
  }
  // The rank of a node through which `source` reaches it: the one with its own place among the node's ranks.
  int gateway(int node_id, int source) const {
    int place = 0;
    for (int rank = 0; rank < source; ++rank) place += node(rank) == node(source) ? 1 : 0;
    for (int rank = 0; rank < run_.ep; ++rank) {
      if (node(rank) == node_id && place-- == 0) return rank;
    }
    throw ConfigError("two_level: every node must hold as many ranks of an expert-parallel group");
  }
  std::vector<ArrowBytes> take() { return std::move(bytes_); }

 private:
  void add(int from, int to, std::size_t arrow, double bytes) {
    if (from == to) return;
    SentBytes& sent = bytes_[static_cast<std::size_t>(from)].at(arrow);
    (node(from) == node(to) ? sent.within_nodes : sent.between_nodes) += bytes;
  }

  const OwnRun& run_;
  int first_rank_;
  double row_;
  double weight_;
  double sum_ = 0.0;
  std::vector<ArrowBytes> bytes_;
};

using Ids = std::vector<std::span<const std::int32_t>>;

void book_uneven(const Placement& placement, const Ids& ids, Books& books) {
  for (std::size_t from = 0; from < ids.size(); ++from) {
    std::vector<double> rows(ids.size(), 0.0);
    for (const std::int32_t id : ids[from]) {
      if (id >= 0) rows[static_cast<std::size_t>(placement.rank_of(id))] += 1.0;
    }
    for (std::size_t to = 0; to < ids.size(); ++to)
      books.round_trip(static_cast<int>(from), static_cast<int>(to), rows[to], rows[to]);
  }
}

void book_padded(const OwnRun& run, const Placement& placement, const Ids& ids, Books& books) {
  const auto width = static_cast<std::size_t>(run.model.top_k);
  const auto chunks = static_cast<std::size_t>(run.chunks);
  for (std::size_t chunk = 0; chunk < chunks; ++chunk) {
    std::int64_t block = 0;
    for (const std::span<const std::int32_t>& of_rank : ids) {
      const std::size_t tokens = of_rank.size() / width;
      const std::size_t begin = tokens * chunk / chunks;
      const std::size_t end = tokens * (chunk + 1) / chunks;
      std::vector<std::int64_t> counts(static_cast<std::size_t>(run.model.experts), 0);
      for (const std::int32_t id : of_rank.subspan(begin * width, (end - begin) * width)) {
        if (id >= 0) ++counts[static_cast<std::size_t>(id)];
      }
      block = std::max(block, *std::max_element(counts.begin(), counts.end()));
      if (run.capacity_rows >= 0) {
        const auto groups = static_cast<std::int64_t>(tokens) / (run.group_sequences * run.sequence_length);
        block = std::max(block, std::min(run.capacity_rows * groups, static_cast<std::int64_t>(end - begin)));
      }
    }
    for (int from = 0; from < run.ep; ++from) {
      for (int to = 0; to < run.ep; ++to) {
        const auto rows = static_cast<double>(block * placement.count(to));
        books.round_trip(from, to, rows, rows);
      }
    }
  }
}

void book_shared_memory(const OwnRun& run, int from, Books& books) {
  for (int to = 0; to < run.ep; ++to) {
    require_config(books.node(to) == books.node(from),
                   "shared_memory: ranks {} and {} of an expert-parallel group are on different nodes", from,
                   to);
    books.meet(from, to);
  }
}

void book_two_level(const OwnRun& run, const Placement& placement, const Ids& ids, Books& books) {
  const auto width = static_cast<std::size_t>(run.model.top_k);
  for (std::size_t source = 0; source < ids.size(); ++source) {
    const int from = static_cast<int>(source);
    for (std::size_t slot = 0; slot < ids[source].size(); slot += width) {
      std::map<int, double> pairs_of_rank;
      std::map<int, double> pairs_of_node;
      for (const std::int32_t id : ids[source].subspan(slot, width)) {
        if (id < 0) continue;
        const int rank = placement.rank_of(id);
        pairs_of_rank[rank] += 1.0;
        pairs_of_node[books.node(rank)] += 1.0;
      }
      for (const auto& [node, pairs] : pairs_of_node)
        books.round_trip(from, books.gateway(node, from), 1.0, pairs);
      for (const auto& [rank, pairs] : pairs_of_rank)
        books.round_trip(books.gateway(books.node(rank), from), rank, 1.0, pairs);
    }
  }
}

// Tokens of every rank's share of a micro-step of `sequences`.
std::vector<std::int64_t> tokens_of_ranks(const OwnRun& run, std::int64_t sequences) {
  const std::int64_t groups = sequences / run.group_sequences;
  std::vector<std::int64_t> tokens;
  for (int rank = 0; rank < run.ranks; ++rank)
    tokens.push_back((groups / run.ranks + (rank < groups % run.ranks ? 1 : 0)) * run.group_sequences *
                     run.sequence_length);
  return tokens;
}

void check(const OwnRun& run) {
  require_config(run.model.is_moe(), "{} has no experts", run.model.name);
  require_config(run.ep >= 1 && run.ranks % run.ep == 0, "ep = {} must divide the ranks = {}", run.ep,
                 run.ranks);
  require_config(run.ep <= run.model.experts, "ep = {} must not exceed the experts = {}", run.ep,
                 run.model.experts);
  require_config(run.node_of_rank.empty() || static_cast<int>(run.node_of_rank.size()) == run.ranks,
                 "{} ranks have a node, there are {}", run.node_of_rank.size(), run.ranks);
  for (const auto& [name, value] :
       {std::pair{"chunks", run.chunks}, std::pair{"global_batch", run.global_batch},
        std::pair{"micro_sequences", run.micro_sequences}, std::pair{"group_sequences", run.group_sequences},
        std::pair{"sequence_length", run.sequence_length}})
    require_config(value >= 1, "{} = {}: must be at least 1", name, value);
}

// Forward arrows run twice where activations are recomputed.
void add_layer(const OwnRun& run, const std::vector<ArrowBytes>& layer, int first_rank, double times,
               std::vector<ArrowBytes>& total) {
  for (std::size_t rank = 0; rank < layer.size(); ++rank) {
    for (std::size_t arrow = 0; arrow < layer[rank].size(); ++arrow) {
      const double runs = times * (run.recompute && arrow < 2 ? 2.0 : 1.0);
      const SentBytes& one = layer[rank].at(arrow);
      total[static_cast<std::size_t>(first_rank) + rank].at(arrow) +=
          {.within_nodes = runs * one.within_nodes, .between_nodes = runs * one.between_nodes};
    }
  }
}

// The share of tokens that have any of `held` experts among their K.
double touched(const ModelSpec& m, std::int64_t held) {
  double missed = 1.0;
  for (std::int64_t i = 0; i < m.top_k; ++i)
    missed *= std::max(0.0, static_cast<double>(m.experts - held - i) / static_cast<double>(m.experts - i));
  return 1.0 - missed;
}

void expect_rank(const OwnRun& run, const Placement& placement, int from, double tokens, Books& books) {
  const auto share = [&](std::int64_t held) {
    return tokens * static_cast<double>(run.model.top_k * held) / static_cast<double>(run.model.experts);
  };
  if (run.exchange == Exchange::kTwoLevel) {
    std::map<int, std::int64_t> held_by_node;
    for (int to = 0; to < run.ep; ++to) held_by_node[books.node(to)] += placement.count(to);
    for (const auto& [node, held] : held_by_node)
      books.round_trip(from, books.gateway(node, from), tokens * touched(run.model, held), share(held));
    for (int to = 0; to < run.ep; ++to)
      books.round_trip(books.gateway(books.node(to), from), to,
                       tokens * touched(run.model, placement.count(to)), share(placement.count(to)));
    return;
  }
  if (run.exchange == Exchange::kSharedMemory) return book_shared_memory(run, from, books);
  for (int to = 0; to < run.ep; ++to) {
    const double rows = share(placement.count(to));
    if (run.exchange == Exchange::kAllgather) {
      books.round_trip(from, to, tokens, tokens * static_cast<double>(run.model.top_k));
    } else {
      books.round_trip(from, to, rows, rows);
    }
  }
}

}  // namespace

std::vector<ArrowBytes> layer_bytes(const OwnRun& run, const Ids& ids_TK, int first_rank) {
  check(run);
  require_config(static_cast<int>(ids_TK.size()) == run.ep, "choices of {} ranks, the group has {}",
                 ids_TK.size(), run.ep);
  for (const std::span<const std::int32_t>& ids : ids_TK) {
    for (const std::int32_t id : ids)
      require_config(id >= -1 && id < run.model.experts, "a token goes to expert {}, there are {}", id,
                     run.model.experts);
  }
  Books books(run, first_rank);
  if (run.ep == 1) return books.take();
  const Placement placement{.experts = run.model.experts, .ranks = run.ep};
  switch (run.exchange) {
    case Exchange::kUneven:
      book_uneven(placement, ids_TK, books);
      break;
    case Exchange::kPadded:
      book_padded(run, placement, ids_TK, books);
      break;
    case Exchange::kAllgather:
      for (int from = 0; from < run.ep; ++from) {
        const auto pairs = static_cast<double>(ids_TK[static_cast<std::size_t>(from)].size());
        for (int to = 0; to < run.ep; ++to)
          books.round_trip(from, to, pairs / static_cast<double>(run.model.top_k), pairs);
      }
      break;
    case Exchange::kTwoLevel:
      book_two_level(run, placement, ids_TK, books);
      break;
    case Exchange::kSharedMemory:
      for (int from = 0; from < run.ep; ++from) book_shared_memory(run, from, books);
      break;
  }
  return books.take();
}

std::vector<ArrowBytes> recorded_step_bytes(const OwnRun& run, const RoutingCounts& recorded,
                                            std::int64_t step) {
  check(run);
  require_config(recorded.experts == run.model.experts && recorded.top_k == run.model.top_k,
                 "recorded routing is {} of {} experts, {} routes {} of {}", recorded.top_k, recorded.experts,
                 run.model.name, run.model.top_k, run.model.experts);
  std::vector<ArrowBytes> total(static_cast<std::size_t>(run.ranks));
  std::set<std::pair<std::int64_t, std::int64_t>> seen;
  for (const RoutingRecord& record : recorded.records) {
    if (record.step != step || !seen.insert({record.micro_step, record.layer}).second) continue;
    const std::vector<std::int64_t> tokens = tokens_of_ranks(run, record.tokens / run.sequence_length);
    std::size_t at = 0;
    Ids ids;
    for (const std::int64_t of_rank : tokens) {
      const auto size = static_cast<std::size_t>(of_rank * run.model.top_k);
      require_config(at + size <= record.ids_TK.size(), "step {}: {} tokens are no whole sequences of {}",
                     step, record.tokens, run.sequence_length);
      ids.push_back(std::span(record.ids_TK).subspan(at, size));
      at += size;
    }
    require_config(at == record.ids_TK.size(), "step {}: {} tokens are no whole sequences of {}", step,
                   record.tokens, run.sequence_length);
    for (int first = 0; first < run.ranks; first += run.ep)
      add_layer(run, layer_bytes(run, Ids(ids.begin() + first, ids.begin() + first + run.ep), first), first,
                1.0, total);
  }
  require_config(!seen.empty(), "recorded routing has no step {}", step);
  return total;
}

std::vector<ArrowBytes> expected_step_bytes(const OwnRun& run) {
  check(run);
  std::vector<ArrowBytes> total(static_cast<std::size_t>(run.ranks));
  if (run.ep == 1) return total;
  const Placement placement{.experts = run.model.experts, .ranks = run.ep};
  for (std::int64_t done = 0; done < run.global_batch; done += run.micro_sequences) {
    const std::vector<std::int64_t> tokens =
        tokens_of_ranks(run, std::min(run.micro_sequences, run.global_batch - done));
    for (int first = 0; first < run.ranks; first += run.ep) {
      Books books(run, first);
      const auto begin = tokens.begin() + first;
      const std::int64_t most = *std::max_element(begin, begin + run.ep);
      for (int from = 0; from < run.ep; ++from) {
        const std::int64_t own = run.exchange == Exchange::kPadded ? most : *(begin + from);
        expect_rank(run, placement, from, static_cast<double>(own), books);
      }
      add_layer(run, books.take(), first, static_cast<double>(run.model.num_moe_layers()), total);
    }
  }
  return total;
}

}  // namespace collegium::plan
