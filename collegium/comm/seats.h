// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "collegium/base/machine.h"
#include "collegium/comm/communicator.h"

namespace collegium::comm {

/// What     Where the ranks of a world sit: on which machines, by their names and not by nodes, which an
///          emulated network makes up; and each one's cores there.
class Seats {
 public:
  /// What     `cores` are those of this rank; `machine` is the one that it runs on.
  /// Comm     one all_gather of 136 bytes.
  explicit Seats(Communicator& world, const std::vector<int>& cores = {},
                 const std::string& machine = machine_name());

  /// What     The ranks on this rank's machine, ascending.
  std::vector<int> neighbours() const;
  /// What     The first rank of every machine, ascending.
  std::vector<int> first_ranks() const;
  /// What     How many cores of this machine its ranks have together.
  int num_cores() const;

  struct Place {
    int place = 0;  ///< of this rank among
    int count = 1;  ///< the ranks of this machine that have the same cores
  };
  Place place_among_sharers() const;

 private:
  static constexpr std::size_t kCoreWords = 16;
  // The machine's number, then one bit per core.
  using Seat = std::array<std::int64_t, 1 + kCoreWords>;

  int rank_;
  std::vector<Seat> seats_;
};

}  // namespace collegium::comm
