// SPDX-License-Identifier: Apache-2.0
#include "collegium/comm/call.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <numeric>

#include "collegium/base/error.h"

namespace collegium::comm {

std::string_view operation_name(Operation operation) {
  switch (operation) {
    case Operation::kAllReduce:
      return "all_reduce";
    case Operation::kAllGather:
      return "all_gather";
    case Operation::kReduceScatter:
      return "reduce_scatter";
    case Operation::kBroadcast:
      return "broadcast";
    case Operation::kAllToAll:
      return "all_to_all";
    case Operation::kSend:
      return "send";
    case Operation::kRecv:
      return "recv";
    case Operation::kBarrier:
      return "barrier";
  }
  throw InternalError("operation without a name");
}

bool is_point_to_point(Operation operation) {
  return operation == Operation::kSend || operation == Operation::kRecv;
}

std::string describe_where(const Where& where) {
  std::vector<std::string> parts;
  if (where.step >= 0) parts.push_back(fmt::format("step {}", where.step));
  if (where.layer >= 0) parts.push_back(fmt::format("layer {}", where.layer));
  if (!where.phase.empty()) parts.push_back(where.phase);
  return fmt::format("{}", fmt::join(parts, ", "));
}

std::int64_t slice_begin(std::int64_t count, int slices, int index) {
  const std::int64_t base = count / slices;
  return base * index + std::min<std::int64_t>(index, count % slices);
}

std::vector<std::vector<Piece>> lay_out(const RankBlocks& blocks) {
  std::vector<std::vector<Piece>> pieces(blocks.rows.size());
  std::int64_t next = 0;
  const auto place = [&](std::size_t rank, std::size_t block) {
    const std::int64_t rows = blocks.rows[rank][block];
    if (rows > 0 && static_cast<int>(rank) != blocks.stays)
      pieces[rank].push_back({.begin = next, .rows = rows});
    next += rows;
  };
  if (!blocks.block_major) {
    for (std::size_t rank = 0; rank < blocks.rows.size(); ++rank) {
      for (std::size_t block = 0; block < blocks.rows[rank].size(); ++block) place(rank, block);
    }
    return pieces;
  }
  std::size_t num_blocks = 0;
  for (const auto& rows : blocks.rows) num_blocks = std::max(num_blocks, rows.size());
  for (std::size_t block = 0; block < num_blocks; ++block) {
    for (std::size_t rank = 0; rank < blocks.rows.size(); ++rank) {
      if (block < blocks.rows[rank].size()) place(rank, block);
    }
  }
  return pieces;
}

namespace {

std::vector<Piece> pieces_of(const std::vector<std::vector<Piece>>& pieces,
                             const std::vector<std::int64_t>& rows, int rank) {
  const auto r = static_cast<std::size_t>(rank);
  if (!pieces.empty()) return pieces[r];
  if (rows[r] == 0) return {};
  return {{.begin = std::accumulate(rows.begin(), rows.begin() + rank, std::int64_t{0}), .rows = rows[r]}};
}

}  // namespace

std::vector<Piece> pieces_to(const Call& call, int rank) {
  return pieces_of(call.send_pieces, call.send_rows, rank);
}

std::vector<Piece> pieces_from(const Call& call, int rank) {
  return pieces_of(call.recv_pieces, call.recv_rows, rank);
}

std::int64_t cut_number(const std::vector<Piece>& pieces) {
  if (pieces.size() < 2) return 0;
  std::uint64_t hash = 14695981039346656037U;  // FNV-1a over the sizes
  for (const Piece& piece : pieces) hash = (hash ^ static_cast<std::uint64_t>(piece.rows)) * 1099511628211U;
  return static_cast<std::int64_t>(hash | 1U);
}

std::vector<std::int64_t> bytes_to_ranks(const Call& call, const Group& group) {
  const int size = group.size();
  std::vector<std::int64_t> bytes(static_cast<std::size_t>(size), 0);
  const std::int64_t input_bytes = call.elements * static_cast<std::int64_t>(c10::elementSize(call.dtype));
  for (int rank = 0; rank < size; ++rank) {
    if (rank == group.rank) continue;
    std::int64_t& to_rank = bytes[static_cast<std::size_t>(rank)];
    switch (call.operation) {
      case Operation::kAllReduce: {
        const std::int64_t count = call.elements;
        const std::int64_t theirs = slice_begin(count, size, rank + 1) - slice_begin(count, size, rank);
        const std::int64_t own =
            slice_begin(count, size, group.rank + 1) - slice_begin(count, size, group.rank);
        to_rank = (theirs + own) * call.row_bytes();
        break;
      }
      case Operation::kAllGather:
        to_rank = input_bytes;
        break;
      case Operation::kReduceScatter:
      case Operation::kAllToAll:
        to_rank = call.send_rows[static_cast<std::size_t>(rank)] * call.row_bytes();
        break;
      case Operation::kBroadcast:
        to_rank = call.peer == group.rank ? input_bytes : 0;
        break;
      case Operation::kSend:
        to_rank = call.peer == rank ? input_bytes : 0;
        break;
      case Operation::kRecv:
      case Operation::kBarrier:
        break;
    }
  }
  return bytes;
}

std::string describe_call(const Call& call, const Group& group, std::uint64_t number) {
  const std::string where = describe_where(call.where);
  return fmt::format("{} (call {} of group '{}'{}{})", operation_name(call.operation), number, group.name,
                     where.empty() ? "" : "; ", where);
}

std::string describe_ranks(const Group& group, std::span<const int> ranks) {
  std::vector<int> world_ranks;
  for (const int rank : ranks)
    world_ranks.push_back(group.members[static_cast<std::size_t>(rank)].world_rank);
  const char* plural = ranks.size() == 1 ? "" : "s";
  const std::string text = fmt::format("rank{} {}", plural, fmt::join(ranks, ", "));
  if (std::equal(ranks.begin(), ranks.end(), world_ranks.begin())) return text;
  return fmt::format("{} (world rank{} {})", text, plural, fmt::join(world_ranks, ", "));
}

}  // namespace collegium::comm
