// SPDX-License-Identifier: Apache-2.0
#include "collegium/comm/seats.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <functional>

namespace collegium::comm {

Seats::Seats(Communicator& world, const std::vector<int>& cores, const std::string& machine)
    : rank_(world.rank()), seats_(static_cast<std::size_t>(world.size())) {
  constexpr std::size_t kBits = 64;
  Seat own{};
  own[0] = static_cast<std::int64_t>(std::hash<std::string>()(machine));
  for (const int core : cores) {
    const auto bit = static_cast<std::size_t>(core);
    if (bit / kBits < kCoreWords) own[1 + bit / kBits] |= std::int64_t{1} << (bit % kBits);
  }
  const auto width = static_cast<std::int64_t>(own.size());
  const at::Tensor mine = at::empty({1, width}, at::kLong);
  std::memcpy(mine.mutable_data_ptr(), own.data(), sizeof(own));
  const at::Tensor all = at::empty({world.size(), width}, at::kLong);
  world.all_gather(mine, all).wait();
  std::memcpy(seats_.data(), all.const_data_ptr(), all.nbytes());
}

std::vector<int> Seats::neighbours() const {
  std::vector<int> ranks;
  for (std::size_t rank = 0; rank < seats_.size(); ++rank) {
    if (seats_[rank][0] == seats_[static_cast<std::size_t>(rank_)][0])
      ranks.push_back(static_cast<int>(rank));
  }
  return ranks;
}

std::vector<int> Seats::first_ranks() const {
  std::vector<int> ranks;
  for (auto seat = seats_.begin(); seat != seats_.end(); ++seat) {
    const bool first = std::none_of(seats_.begin(), seat, [&](const Seat& s) { return s[0] == (*seat)[0]; });
    if (first) ranks.push_back(static_cast<int>(seat - seats_.begin()));
  }
  return ranks;
}

int Seats::num_cores() const {
  int count = 0;
  for (std::size_t word = 1; word <= kCoreWords; ++word) {
    std::uint64_t cores = 0;
    for (const int rank : neighbours())
      cores |= static_cast<std::uint64_t>(seats_[static_cast<std::size_t>(rank)][word]);
    count += std::popcount(cores);
  }
  return count;
}

Seats::Place Seats::place_among_sharers() const {
  const auto own = seats_.begin() + rank_;
  return {.place = static_cast<int>(std::count(seats_.begin(), own, *own)),
          .count = static_cast<int>(std::count(seats_.begin(), seats_.end(), *own))};
}

}  // namespace collegium::comm
