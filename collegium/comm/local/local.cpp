// SPDX-License-Identifier: Apache-2.0
#include "collegium/comm/local/local.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <condition_variable>
#include <system_error>
#include <thread>

#include "collegium/comm/local/world.h"

namespace collegium::comm {

namespace {

class LocalWork final : public Work::State {
 public:
  LocalWork(Room::Seat seat, std::string name, Group group, std::chrono::milliseconds timeout)
      : seat_(std::move(seat)), name_(std::move(name)), group_(std::move(group)), timeout_(timeout) {}

  void wait() override {
    if (waited_) return;
    bool in_time = false;
    try {
      in_time = seat_.meeting->wait_until(Clock::now() + timeout_);
    } catch (const PeerFailure&) {
      throw;
    } catch (const CommError& error) {
      throw CommError(fmt::format("{}: {}", name_, error.what()));
    }
    if (!in_time) {
      throw CommError(fmt::format("{}: no answer within {:g} s from {}", name_,
                                  std::chrono::duration<double>(timeout_).count(),
                                  describe_ranks(group_, seat_.meeting->missing_ranks())));
    }
    seat_.meeting->release(seat_.place);
    waited_ = true;
  }
  bool done() override { return waited_ || seat_.meeting->done(); }
  Timeline timeline() const override { return seat_.meeting->timeline(seat_.place); }

 private:
  Room::Seat seat_;
  std::string name_;
  Group group_;
  std::chrono::milliseconds timeout_;
  bool waited_ = false;
};

class LocalCommunicator final : public Communicator {
 public:
  LocalCommunicator(std::shared_ptr<World> world, std::shared_ptr<Room> room, Group group)
      : Communicator(std::move(group)), world_(std::move(world)), room_(std::move(room)) {}

  Work start(Call call) override {
    const std::uint64_t number = is_point_to_point(call.operation) ? next_message_++ : next_call_++;
    std::string name = describe_call(call, group(), number);
    Room::Seat seat = room_->join(rank(), number, std::move(call), group());
    return Work(
        std::make_shared<LocalWork>(std::move(seat), std::move(name), group(), world_->options().timeout));
  }

  std::shared_ptr<Communicator> split(int color, int key, const std::string& name) override {
    Group group = agree_on_split(color, key, name);
    const std::uint64_t number = next_split_++;
    if (group.members.empty()) return nullptr;
    std::vector<int> world_ranks;
    for (const Member& member : group.members) world_ranks.push_back(member.world_rank);
    return make_local_communicator(world_, world_->room(*room_, number, std::move(world_ranks)),
                                   std::move(group));
  }

 private:
  std::shared_ptr<World> world_;
  std::shared_ptr<Room> room_;
  std::uint64_t next_call_ = 0;
  std::uint64_t next_message_ = 0;
  std::uint64_t next_split_ = 0;
};

// Shared with the rank threads, which may outlive run_ranks().
struct Run {
  Run(int num_ranks, const std::function<void(Communicator&)>& body, const LocalOptions& options)
      : world(std::make_shared<World>(num_ranks, options)),
        fn(body),
        ended(static_cast<std::size_t>(num_ranks)) {}

  void run_rank(int rank) {
    try {
      const Group group = local_world_group(rank, static_cast<int>(ended.size()), world->options());
      fn(*make_local_communicator(world, world->world_room(), group));
      world->leave(rank);
    } catch (...) {
      world->fail(rank, std::current_exception());
    }
    {
      const std::lock_guard lock(mutex);
      ended[static_cast<std::size_t>(rank)] = true;
    }
    changed.notify_all();
  }

  // This rank and all after it have no thread: they fail, and the others with them.
  void refuse_from(int rank, const std::string& reason) {
    world->fail(rank, std::make_exception_ptr(ConfigError(fmt::format(
                          "the system gives it no thread ({}); start fewer ranks in one process", reason))));
    const std::lock_guard lock(mutex);
    std::fill(ended.begin() + rank, ended.end(), true);
  }

  // Waits for all ranks, after a failure no longer than the time-out. Returns the ranks that are still
  // running.
  std::vector<int> wait() {
    std::unique_lock lock(mutex);
    const auto all_ended = [this] { return std::find(ended.begin(), ended.end(), false) == ended.end(); };
    changed.wait(lock, [&] { return all_ended() || world->failure() != nullptr; });
    changed.wait_for(lock, world->options().timeout, all_ended);
    std::vector<int> running;
    for (std::size_t rank = 0; rank < ended.size(); ++rank) {
      if (!ended[rank]) running.push_back(static_cast<int>(rank));
    }
    return running;
  }

  std::shared_ptr<World> world;
  std::function<void(Communicator&)> fn;
  std::mutex mutex;
  std::condition_variable changed;
  std::vector<bool> ended;
};

}  // namespace

std::shared_ptr<Communicator> make_local_communicator(std::shared_ptr<World> world,
                                                      std::shared_ptr<Room> room, Group group) {
  return std::make_shared<LocalCommunicator>(std::move(world), std::move(room), std::move(group));
}

void run_ranks(int num_ranks, const std::function<void(Communicator&)>& fn, const LocalOptions& options) {
  require_config(num_ranks > 0, "ranks = {}: must be at least 1", num_ranks);
  require_config(options.timeout.count() > 0, "time-out = {} ms: must be positive", options.timeout.count());
  const auto run = std::make_shared<Run>(num_ranks, fn, options);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < num_ranks; ++rank) {
    try {
      threads.emplace_back([run, rank] { run->run_rank(rank); });
    } catch (const std::system_error& error) {
      run->refuse_from(rank, error.what());
      break;
    }
  }
  const std::vector<int> running = run->wait();
  for (std::size_t rank = 0; rank < threads.size(); ++rank) {
    const bool stuck = std::find(running.begin(), running.end(), static_cast<int>(rank)) != running.end();
    stuck ? threads[rank].detach() : threads[rank].join();
  }
  const std::exception_ptr failure = run->world->failure();
  if (!failure) return;
  if (running.empty()) std::rethrow_exception(failure);
  try {
    std::rethrow_exception(failure);
  } catch (const std::exception& error) {
    throw CommError(fmt::format("{}; rank {} did not come back {:g} s after that", error.what(),
                                fmt::join(running, ", "),
                                std::chrono::duration<double>(options.timeout).count()));
  }
}

std::shared_ptr<Communicator> single_rank_world() {
  const LocalOptions options;
  auto world = std::make_shared<World>(1, options);
  return make_local_communicator(world, world->world_room(), local_world_group(0, 1, options));
}

}  // namespace collegium::comm
