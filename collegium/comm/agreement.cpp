// SPDX-License-Identifier: Apache-2.0
#include "collegium/comm/agreement.h"

#include <c10/core/ScalarType.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <cstring>

#include "collegium/base/error.h"

namespace collegium::comm {

namespace {

constexpr std::size_t kPhaseBytes = 32;
constexpr std::size_t kFixedNumbers = 9;
constexpr std::size_t kPhaseNumbers = kPhaseBytes / sizeof(std::int64_t);

std::string_view reduce_name(ReduceOp op) {
  constexpr std::array<std::string_view, 3> kNames = {"sum", "max", "min"};
  return kNames.at(static_cast<std::size_t>(op));
}

// "rank 1 (layer 2, dispatch) calls all_to_all of float32"
std::string who(const Group& group, int rank, const Call& call) {
  const std::string where = describe_where(call.where);
  const std::array<int, 1> one = {rank};
  std::string text = fmt::format("{}{}{}{} calls {}", describe_ranks(group, one), where.empty() ? "" : " (",
                                 where, where.empty() ? "" : ")", operation_name(call.operation));
  if (call.operation != Operation::kBarrier) text += fmt::format(" of {}", c10::toString(call.dtype));
  return text;
}

std::string detail(const Call& call) {
  switch (call.operation) {
    case Operation::kAllReduce:
      return fmt::format("{} of {} elements", reduce_name(call.reduce), call.elements);
    case Operation::kBroadcast:
      return fmt::format("root {}, {} elements", call.peer, call.elements);
    case Operation::kAllGather:
      return fmt::format("rows [{}] of {} elements", fmt::join(call.recv_rows, ", "), call.row_elements);
    case Operation::kReduceScatter:
      return fmt::format("{}, rows [{}] of {} elements", reduce_name(call.reduce),
                         fmt::join(call.send_rows, ", "), call.row_elements);
    case Operation::kAllToAll:
      return fmt::format("rows of {} elements", call.row_elements);
    case Operation::kSend:
    case Operation::kRecv:
      return fmt::format("{} elements", call.elements);
    case Operation::kBarrier:
      break;
  }
  return "";
}

bool same_numbers(const Call& a, const Call& b) {
  if (a.dtype != b.dtype) return false;
  switch (a.operation) {
    case Operation::kAllReduce:
      return a.reduce == b.reduce && a.elements == b.elements;
    case Operation::kBroadcast:
      return a.peer == b.peer && a.elements == b.elements;
    case Operation::kAllGather:
      return a.recv_rows == b.recv_rows && a.row_elements == b.row_elements;
    case Operation::kReduceScatter:
      return a.reduce == b.reduce && a.send_rows == b.send_rows && a.row_elements == b.row_elements;
    case Operation::kAllToAll:
      return a.row_elements == b.row_elements;
    case Operation::kSend:
    case Operation::kRecv:
      return a.elements == b.elements;
    case Operation::kBarrier:
      break;
  }
  return true;
}

std::int64_t cut_of(const std::vector<std::int64_t>& cuts, std::size_t rank) {
  return cuts.empty() ? 0 : cuts[rank];
}

}  // namespace

std::optional<std::string> find_disagreement(const Group& group, std::span<const int> ranks,
                                             std::span<const Call* const> calls) {
  const Call& first = *calls[0];
  for (std::size_t i = 1; i < calls.size(); ++i) {
    const Call& other = *calls[i];
    const bool same_operation = first.operation == other.operation || is_point_to_point(first.operation);
    if (same_operation && same_numbers(first, other)) continue;
    const bool numbers_matter = same_operation && first.operation != Operation::kBarrier;
    return fmt::format("group '{}': {}{}{}, but {}{}{}", group.name, who(group, ranks[0], first),
                       numbers_matter ? ": " : "", numbers_matter ? detail(first) : "",
                       who(group, ranks[i], other), numbers_matter ? ": " : "",
                       numbers_matter ? detail(other) : "");
  }
  if (first.operation != Operation::kAllToAll) return std::nullopt;
  for (std::size_t from = 0; from < calls.size(); ++from) {
    for (std::size_t to = 0; to < calls.size(); ++to) {
      const std::int64_t sent = calls[from]->send_rows[to];
      const std::int64_t expected = calls[to]->recv_rows[from];
      if (sent != expected) {
        return fmt::format("group '{}': {}: sends {} rows to rank {}, which expects {} rows from rank {}",
                           group.name, who(group, ranks[from], *calls[from]), sent, ranks[to], expected,
                           ranks[from]);
      }
      if (cut_of(calls[from]->send_cuts, to) != cut_of(calls[to]->recv_cuts, from)) {
        return fmt::format(
            "group '{}': {}: cuts the {} rows for rank {} into other blocks than that rank expects",
            group.name, who(group, ranks[from], *calls[from]), sent, ranks[to]);
      }
    }
  }
  return std::nullopt;
}

std::size_t packed_call_size(int group_size) {
  return kFixedNumbers + kPhaseNumbers + 4 * static_cast<std::size_t>(group_size);
}

std::vector<std::int64_t> pack_call(const Call& call, int group_size) {
  std::vector<std::int64_t> packed = {static_cast<std::int64_t>(call.operation),
                                      call.elements,
                                      call.row_elements,
                                      static_cast<std::int64_t>(call.dtype),
                                      static_cast<std::int64_t>(call.reduce),
                                      call.peer,
                                      call.tag,
                                      call.where.step,
                                      call.where.layer};
  packed.resize(packed_call_size(group_size), 0);
  std::memcpy(&packed[kFixedNumbers], call.where.phase.data(),
              std::min(call.where.phase.size(), kPhaseBytes - 1));
  auto rows = packed.begin() + static_cast<std::ptrdiff_t>(kFixedNumbers + kPhaseNumbers);
  std::copy(call.send_rows.begin(), call.send_rows.end(), rows);
  const std::ptrdiff_t width = group_size;
  std::copy(call.recv_rows.begin(), call.recv_rows.end(), rows + width);
  std::copy(call.send_cuts.begin(), call.send_cuts.end(), rows + 2 * width);
  std::copy(call.recv_cuts.begin(), call.recv_cuts.end(), rows + 3 * width);
  return packed;
}

Call unpack_call(std::span<const std::int64_t> packed, int group_size) {
  COLLEGIUM_CHECK(packed.size() == packed_call_size(group_size), "a packed call has {} numbers, must have {}",
                  packed.size(), packed_call_size(group_size));
  Call call;
  call.operation = static_cast<Operation>(packed[0]);
  call.elements = packed[1];
  call.row_elements = packed[2];
  call.dtype = static_cast<at::ScalarType>(packed[3]);
  call.reduce = static_cast<ReduceOp>(packed[4]);
  call.peer = static_cast<int>(packed[5]);
  call.tag = static_cast<int>(packed[6]);
  call.where.step = packed[7];
  call.where.layer = packed[8];
  call.where.phase = reinterpret_cast<const char*>(&packed[kFixedNumbers]);
  const auto rows = packed.subspan(kFixedNumbers + kPhaseNumbers);
  const auto numbers = [&](std::ptrdiff_t which) {
    const auto begin = rows.begin() + which * group_size;
    return std::vector<std::int64_t>(begin, begin + group_size);
  };
  call.send_rows = numbers(0);
  call.recv_rows = numbers(1);
  call.send_cuts = numbers(2);
  call.recv_cuts = numbers(3);
  return call;
}

}  // namespace collegium::comm
