// SPDX-License-Identifier: Apache-2.0
#pragma once

// Where the ranks of one process find each other.

#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "collegium/comm/local/local.h"
#include "collegium/comm/local/meeting.h"

namespace collegium::comm {

/// The meetings of one group. Ranks are those of the group.
class Room {
 public:
  Room(std::uint64_t id, std::vector<int> world_ranks) : id_(id), world_ranks_(std::move(world_ranks)) {}

  struct Seat {
    std::shared_ptr<Meeting> meeting;
    std::size_t place = 0;
  };

  /// What     Takes `rank`'s call to the meeting it belongs to: the `number`th collective of the group, or
  ///          the oldest unanswered message of the pair.
  Seat join(int rank, std::uint64_t number, Call call, const Group& group);

  /// What     Ends all present and future meetings that are not complete, with a PeerFailure.
  void close(const std::string& reason);
  /// What     This world rank takes part in nothing more: meetings that need it end with an error.
  void leave(int world_rank);
  std::uint64_t id() const { return id_; }

 private:
  struct Entry {
    std::shared_ptr<Meeting> meeting;
    std::vector<int> ranks;
    std::set<int> joined;  // places: indices into `ranks` (a rank may send to itself)
  };
  using Channel = std::tuple<int, int, int>;  // source, destination, tag

  Entry make_entry(std::vector<int> ranks) const;
  Seat join_collective(int rank, std::uint64_t number);
  Seat join_message(int rank, const Call& call);
  void end_if_hopeless(const Entry& entry) const;

  const std::uint64_t id_;
  const std::vector<int> world_ranks_;
  std::mutex mutex_;
  std::map<std::uint64_t, Entry> collectives_;
  std::map<Channel, std::deque<Entry>> messages_;  // all of one channel wait for the same side
  std::optional<std::string> closed_;
  std::set<int> left_;  // group ranks
};

/// All groups of one run_ranks().
class World {
 public:
  World(int num_ranks, LocalOptions options);

  const LocalOptions& options() const { return options_; }
  std::shared_ptr<Room> world_room() const { return world_room_; }
  /// The room of a group made by the `number`th split of `parent`; the same for all its members.
  std::shared_ptr<Room> room(const Room& parent, std::uint64_t number, std::vector<int> world_ranks);

  /// What     A rank ended with an exception; the first one that is no PeerFailure is kept and ends all
  ///          waits.
  void fail(int rank, const std::exception_ptr& error);
  void leave(int rank);
  /// The first failure with "rank R of N: " in front.
  std::exception_ptr failure() const;

 private:
  using Key = std::tuple<std::uint64_t, std::uint64_t, int>;  // parent, number of the split, first world rank

  // Until all members have come a room stays, though those that were first may have left again.
  struct Known {
    std::shared_ptr<Room> kept;
    std::weak_ptr<Room> room;
    std::size_t missing = 0;
  };

  std::vector<std::shared_ptr<Room>> rooms() const;

  const int num_ranks_;
  const LocalOptions options_;
  const std::shared_ptr<Room> world_room_;
  mutable std::mutex mutex_;
  std::map<Key, Known> rooms_;
  std::uint64_t next_id_ = 1;
  std::optional<std::string> failure_text_;
  std::exception_ptr failure_;
  std::set<int> left_;
};

/// What     A rank's view of a room as a communicator.
std::shared_ptr<Communicator> make_local_communicator(std::shared_ptr<World> world,
                                                      std::shared_ptr<Room> room, Group group);

/// What     The group of all ranks as `rank` sees it.
Group local_world_group(int rank, int num_ranks, const LocalOptions& options);

}  // namespace collegium::comm
