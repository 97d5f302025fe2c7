// SPDX-License-Identifier: Apache-2.0
#pragma once

// What one rank communicated: where in the program, what, how much within and between nodes, how long, how
// long the rank stood still for it, and how much of it was hidden behind computation.

#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "collegium/comm/communicator.h"

namespace collegium::comm {

/// Sums over the calls of one kind.
struct LedgerEntry {
  std::int64_t calls = 0;
  std::int64_t bytes_within_nodes = 0;   ///< sent by this rank to other ranks of its node
  std::int64_t bytes_between_nodes = 0;  ///< sent by this rank to ranks of other nodes
  double transfer_s = 0.0;               ///< from the beginning of the transfer to its end
  double skew_s = 0.0;                   ///< from this rank's call until the last rank's (others were late)
  double waiting_s = 0.0;                ///< this rank stood in wait()
};

struct LedgerKey {
  std::int64_t step = -1;
  std::int64_t layer = -1;
  std::string phase;
  std::string axis;  ///< the group's name
  Operation operation = Operation::kBarrier;

  auto operator<=>(const LedgerKey&) const = default;
};

/// How much of the communication ran while this rank did not stand in wait().
struct Overlap {
  double communicating_s = 0.0;  ///< length of the union of all transfers
  double hidden_s = 0.0;         ///< of it, outside the union of all waits

  /// hidden_s / communicating_s; 0 when nothing was communicated.
  double hidden_share() const { return communicating_s > 0.0 ? hidden_s / communicating_s : 0.0; }
};

/// One rank's books, shared by all communicators that write into them. Used by one thread at a time.
class Ledger {
 public:
  const std::map<LedgerKey, LedgerEntry>& entries() const { return entries_; }
  /// What     The sum of the entries that `selects` accepts.
  template <typename Selector>
  LedgerEntry sum(Selector selects) const;
  /// What     Over all calls since the last clear(), or of one operation only.
  Overlap overlap() const;
  Overlap overlap(Operation operation) const;
  void clear();

  /// What     Books a call: its bytes when it starts,
  void add_call(const LedgerKey& key, std::int64_t within, std::int64_t between);
  /// and its times when wait() returns.
  void add_times(const LedgerKey& key, const Timeline& timeline, Clock::time_point wait_begin,
                 Clock::time_point wait_end);

 private:
  struct Interval {
    Clock::time_point begin, end;
  };
  struct Transfer {
    Operation operation;
    Interval interval;
  };
  using Intervals = std::vector<Interval>;

  static Intervals merge(Intervals intervals);
  Overlap overlap_of(Intervals transfers) const;

  std::map<LedgerKey, LedgerEntry> entries_;
  std::vector<Transfer> transfers_;
  Intervals waits_;
};

struct LedgerOptions {
  /// Before an operation starts, operation, sizes, dtype and order are compared across the ranks of the
  /// group: a disagreement is an error on all of them instead of a hang. Makes every call wait for all
  /// ranks.
  bool check = false;
};

/// What     A communicator that passes everything on to `inner` and books it; its groups (split) write into
///          the same books.
/// Comm     collective when options.check is set (a group for the comparison is split off).
/// Throws   CommError from a call in checking mode: names ranks, their step, layer and phase, and both
///          calls.
std::shared_ptr<Communicator> with_ledger(std::shared_ptr<Communicator> inner, std::shared_ptr<Ledger> ledger,
                                          const LedgerOptions& options = {});

template <typename Selector>
LedgerEntry Ledger::sum(Selector selects) const {
  LedgerEntry total;
  for (const auto& [key, entry] : entries_) {
    if (!selects(key)) continue;
    total.calls += entry.calls;
    total.bytes_within_nodes += entry.bytes_within_nodes;
    total.bytes_between_nodes += entry.bytes_between_nodes;
    total.transfer_s += entry.transfer_s;
    total.skew_s += entry.skew_s;
    total.waiting_s += entry.waiting_s;
  }
  return total;
}

}  // namespace collegium::comm
