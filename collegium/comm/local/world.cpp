// SPDX-License-Identifier: Apache-2.0
#include "collegium/comm/local/world.h"

#include <fmt/format.h>

#include <algorithm>
#include <numeric>
#include <utility>

namespace collegium::comm {

namespace {

std::vector<int> first_ranks(int count) {
  std::vector<int> ranks(static_cast<std::size_t>(count));
  std::iota(ranks.begin(), ranks.end(), 0);
  return ranks;
}

// The same kind of error with the rank in front.
std::exception_ptr with_rank(const std::exception_ptr& error, int rank, int num_ranks, std::string& text) {
  const auto say = [&](const std::exception& e) {
    text = fmt::format("rank {} of {}: {}", rank, num_ranks, e.what());
    return text;
  };
  try {
    std::rethrow_exception(error);
  } catch (const PeerFailure& e) {
    return std::make_exception_ptr(PeerFailure(say(e)));
  } catch (const CommError& e) {
    return std::make_exception_ptr(CommError(say(e)));
  } catch (const ConfigError& e) {
    return std::make_exception_ptr(ConfigError(say(e)));
  } catch (const InternalError& e) {
    return std::make_exception_ptr(InternalError(say(e)));
  } catch (const std::exception& e) {
    return std::make_exception_ptr(Error(say(e)));
  } catch (...) {
    text = fmt::format("rank {} of {}: an exception of unknown type", rank, num_ranks);
    return std::make_exception_ptr(Error(text));
  }
}

bool is_peer_failure(const std::exception_ptr& error) {
  try {
    std::rethrow_exception(error);
  } catch (const PeerFailure&) {
    return true;
  } catch (...) {
    return false;
  }
}

}  // namespace

Room::Entry Room::make_entry(std::vector<int> ranks) const {
  auto meeting = std::make_shared<Meeting>(ranks);
  return {.meeting = std::move(meeting), .ranks = std::move(ranks), .joined = {}};
}

Room::Seat Room::join_collective(int rank, std::uint64_t number) {
  auto found = collectives_.find(number);
  if (found == collectives_.end()) {
    found =
        collectives_.emplace(number, make_entry(first_ranks(static_cast<int>(world_ranks_.size())))).first;
  }
  Entry& entry = found->second;
  entry.joined.insert(rank);
  end_if_hopeless(entry);
  const Seat seat = {.meeting = entry.meeting, .place = static_cast<std::size_t>(rank)};
  if (entry.joined.size() == entry.ranks.size()) collectives_.erase(found);
  return seat;
}

Room::Seat Room::join_message(int rank, const Call& call) {
  const bool sends = call.operation == Operation::kSend;
  const Channel channel = sends ? Channel{rank, call.peer, call.tag} : Channel{call.peer, rank, call.tag};
  const int place = sends ? 0 : 1;
  std::deque<Entry>& waiting = messages_[channel];
  if (!waiting.empty() && !waiting.front().joined.contains(place)) {
    const Seat seat = {.meeting = waiting.front().meeting, .place = static_cast<std::size_t>(place)};
    waiting.pop_front();
    if (waiting.empty()) messages_.erase(channel);
    return seat;
  }
  waiting.push_back(make_entry({std::get<0>(channel), std::get<1>(channel)}));
  waiting.back().joined.insert(place);
  end_if_hopeless(waiting.back());
  return {.meeting = waiting.back().meeting, .place = static_cast<std::size_t>(place)};
}

Room::Seat Room::join(int rank, std::uint64_t number, Call call, const Group& group) {
  Seat seat;
  {
    const std::lock_guard lock(mutex_);
    seat = is_point_to_point(call.operation) ? join_message(rank, call) : join_collective(rank, number);
  }
  seat.meeting->post(seat.place, std::move(call), group);
  return seat;
}

void Room::end_if_hopeless(const Entry& entry) const {
  if (closed_) entry.meeting->fail(std::make_exception_ptr(PeerFailure(*closed_)));
  for (std::size_t place = 0; place < entry.ranks.size(); ++place) {
    const int rank = entry.ranks[place];
    if (entry.joined.contains(static_cast<int>(place)) || !left_.contains(rank)) continue;
    entry.meeting->fail(std::make_exception_ptr(
        CommError(fmt::format("rank {} (world rank {}) has ended and will not take part", rank,
                              world_ranks_[static_cast<std::size_t>(rank)]))));
  }
}

void Room::close(const std::string& reason) {
  const std::lock_guard lock(mutex_);
  closed_ = reason;
  for (const auto& [number, entry] : collectives_) end_if_hopeless(entry);
  for (const auto& [channel, entries] : messages_) {
    for (const Entry& entry : entries) end_if_hopeless(entry);
  }
}

void Room::leave(int world_rank) {
  const std::lock_guard lock(mutex_);
  const auto found = std::find(world_ranks_.begin(), world_ranks_.end(), world_rank);
  if (found == world_ranks_.end()) return;
  left_.insert(static_cast<int>(found - world_ranks_.begin()));
  for (const auto& [number, entry] : collectives_) end_if_hopeless(entry);
  for (const auto& [channel, entries] : messages_) {
    for (const Entry& entry : entries) end_if_hopeless(entry);
  }
}

World::World(int num_ranks, LocalOptions options)
    : num_ranks_(num_ranks),
      options_(options),
      world_room_(std::make_shared<Room>(0, first_ranks(num_ranks))) {}

std::shared_ptr<Room> World::room(const Room& parent, std::uint64_t number, std::vector<int> world_ranks) {
  const std::lock_guard lock(mutex_);
  std::erase_if(rooms_, [](const auto& entry) { return entry.second.room.expired(); });
  Known& known = rooms_[{parent.id(), number, world_ranks.front()}];
  if (!known.kept) {
    known.missing = world_ranks.size();
    known.kept = std::make_shared<Room>(next_id_++, std::move(world_ranks));
    known.room = known.kept;
    for (const int rank : left_) known.kept->leave(rank);
    if (failure_text_) known.kept->close(*failure_text_);
  }
  std::shared_ptr<Room> room = known.kept;
  if (--known.missing == 0) known.kept.reset();
  return room;
}

std::vector<std::shared_ptr<Room>> World::rooms() const {
  std::vector<std::shared_ptr<Room>> rooms = {world_room_};
  for (const auto& [key, known] : rooms_) {
    if (std::shared_ptr<Room> room = known.room.lock()) rooms.push_back(std::move(room));
  }
  return rooms;
}

void World::fail(int rank, const std::exception_ptr& error) {
  const std::lock_guard lock(mutex_);
  if (failure_ && !is_peer_failure(failure_)) return;
  if (failure_ && is_peer_failure(error)) return;
  std::string text;
  const std::exception_ptr named = with_rank(error, rank, num_ranks_, text);
  failure_ = named;
  failure_text_ = "stopped because of another rank: " + text;
  for (const std::shared_ptr<Room>& room : rooms()) room->close(*failure_text_);
}

void World::leave(int rank) {
  const std::lock_guard lock(mutex_);
  left_.insert(rank);
  for (const std::shared_ptr<Room>& room : rooms()) room->leave(rank);
}

std::exception_ptr World::failure() const {
  const std::lock_guard lock(mutex_);
  return failure_;
}

Group local_world_group(int rank, int num_ranks, const LocalOptions& options) {
  Group group{.name = "world", .rank = rank, .members = {}, .where = std::make_shared<Where>()};
  for (int r = 0; r < num_ranks; ++r) {
    const int node = options.ranks_per_node > 0 ? r / options.ranks_per_node : 0;
    group.members.push_back({.world_rank = r, .node = node});
  }
  return group;
}

}  // namespace collegium::comm
