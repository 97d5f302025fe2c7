// SPDX-License-Identifier: Apache-2.0
#include "collegium/comm/emulated/emulated.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <array>
#include <thread>

#include "collegium/comm/seats.h"

namespace collegium::comm {

namespace {

// What ranks tell each other about a call: posted, two ports' sends_until and receives_until, then bytes to
// each rank.
constexpr int kPortNumbers = 5;

double to_seconds(Clock::time_point time) {
  return std::chrono::duration<double>(time.time_since_epoch()).count();
}

Clock::time_point to_time(double seconds) {
  return Clock::time_point(
      std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds)));
}

// This rank's ports, shared by all its groups.
struct Ports {
  Network network;
  std::array<double, 2> sends_until{};
  std::array<double, 2> receives_until{};
};

class EmulatedWork : public Work::State {
 public:
  EmulatedWork(Work inner, Work control, Clock::time_point posted)
      : inner_(std::move(inner)), control_(std::move(control)), timeline_{posted, posted, posted, posted} {}

  void wait() override {
    if (waited_) return;
    const Clock::time_point called = Clock::now();
    inner_.wait();
    control_.wait();
    settle();
    std::this_thread::sleep_until(timeline_.done);
    // What took longer than the network would have, took longer; but not what was through before anybody
    // asked.
    if (called < timeline_.done) timeline_.done = std::max(timeline_.done, inner_.timeline().done);
    waited_ = true;
  }
  bool done() override {
    if (waited_) return true;
    if (!inner_.done() || !control_.done()) return false;
    control_.wait();
    settle();
    return Clock::now() >= timeline_.done;
  }
  Timeline timeline() const override { return timeline_; }

 protected:
  /// Sets began and done from what the ranks have told each other.
  virtual void compute(Timeline& timeline) = 0;

 private:
  void settle() {
    if (!settled_) compute(timeline_);
    settled_ = true;
  }

  Work inner_;
  Work control_;
  Timeline timeline_;
  bool settled_ = false;
  bool waited_ = false;
};

class CollectiveWork final : public EmulatedWork {
 public:
  CollectiveWork(Work inner, Work control, Clock::time_point posted, Call call, Group group, at::Tensor told,
                 std::shared_ptr<Ports> ports)
      : EmulatedWork(std::move(inner), std::move(control), posted),
        call_(std::move(call)),
        group_(std::move(group)),
        told_(std::move(told)),
        ports_(std::move(ports)) {}

 protected:
  void compute(Timeline& timeline) override {
    const auto size = static_cast<std::size_t>(group_.size());
    const auto self = static_cast<std::size_t>(group_.rank);
    std::vector<PortState> states;
    std::vector<std::vector<std::int64_t>> bytes(size);
    double began = 0.0;
    for (std::size_t r = 0; r < size; ++r) {
      const double* numbers = told_.data_ptr<double>() + r * static_cast<std::size_t>(told_.size(1));
      states.push_back({.posted = numbers[0],
                        .sends_until = {numbers[1], numbers[2]},
                        .receives_until = {numbers[3], numbers[4]}});
      for (std::size_t to = 0; to < size; ++to)
        bytes[r].push_back(static_cast<std::int64_t>(numbers[kPortNumbers + to]));
      began = std::max(began, numbers[0]);
    }
    // Calls that were posted later and settled earlier have used the receiving ports meanwhile.
    states[self].receives_until = ports_->receives_until;
    const std::vector<double> ends =
        simulate_collective(ports_->network, group_.members, call_, bytes, states);
    for (std::size_t link = 0; link < 2; ++link) {
      ports_->sends_until[link] = std::max(ports_->sends_until[link], states[self].sends_until[link]);
      ports_->receives_until[link] = states[self].receives_until[link];
    }
    timeline.ready = timeline.began = to_time(began);
    timeline.done = std::max(to_time(ends[self]), timeline.began);
  }

 private:
  Call call_;
  Group group_;
  at::Tensor told_;
  std::shared_ptr<Ports> ports_;
};

// send and recv: the sender tells when its message starts and how long it lasts.
class MessageWork final : public EmulatedWork {
 public:
  MessageWork(Work inner, Work control, Clock::time_point posted, bool receives, std::size_t link,
              at::Tensor told, std::shared_ptr<Ports> ports)
      : EmulatedWork(std::move(inner), std::move(control), posted),
        receives_(receives),
        link_(link),
        told_(std::move(told)),
        ports_(std::move(ports)) {}

 protected:
  void compute(Timeline& timeline) override {
    const double start = told_.data_ptr<double>()[0];
    const double duration = told_.data_ptr<double>()[1];
    timeline.ready = timeline.began = std::max(timeline.posted, to_time(start));
    timeline.done = to_time(start + duration);
    if (!receives_) return;
    double& receives_until = ports_->receives_until[link_];
    receives_until = std::max(receives_until, start + ports_->network.links[link_].latency_s) + duration;
    timeline.done = to_time(receives_until);
  }

 private:
  bool receives_;
  std::size_t link_;
  at::Tensor told_;
  std::shared_ptr<Ports> ports_;
};

Group on_network(Group group, const Network& network) {
  for (Member& member : group.members) member.node = network.node_of(member.world_rank);
  return group;
}

class EmulatedCommunicator final : public Communicator {
 public:
  EmulatedCommunicator(std::shared_ptr<Communicator> inner, std::shared_ptr<Ports> ports)
      : Communicator(on_network(inner->group(), ports->network)),
        inner_(std::move(inner)),
        control_(inner_->split(0, inner_->rank(), inner_->name() + " (network)")),
        ports_(std::move(ports)) {}

  Work start(Call call) override {
    return is_point_to_point(call.operation) ? start_message(std::move(call))
                                             : start_collective(std::move(call));
  }

  std::shared_ptr<Communicator> split(int color, int key, const std::string& name) override {
    auto inner = inner_->split(color, key, name);
    return inner ? std::make_shared<EmulatedCommunicator>(std::move(inner), ports_) : nullptr;
  }

 private:
  Work start_collective(Call call) {
    const Clock::time_point posted = Clock::now();
    const std::vector<std::int64_t> bytes = bytes_to_ranks(call, group());
    const at::Tensor own = at::empty({1, kPortNumbers + size()}, at::kDouble);
    auto* numbers = own.data_ptr<double>();
    numbers[0] = to_seconds(posted);
    for (std::size_t link = 0; link < 2; ++link) {
      numbers[1 + link] = ports_->sends_until[link];
      numbers[3 + link] = ports_->receives_until[link];
    }
    for (int r = 0; r < size(); ++r) {
      const std::int64_t to_rank = bytes[static_cast<std::size_t>(r)];
      numbers[kPortNumbers + r] = static_cast<double>(to_rank);
      occupy(link_to(r), numbers[0], to_rank);
    }
    const at::Tensor all = at::empty({size(), own.size(1)}, at::kDouble);
    Call shape = call;
    shape.input = at::Tensor();
    shape.output = at::Tensor();
    Work inner = inner_->start(std::move(call));
    Work control = control_->all_gather(own, all);
    return Work(std::make_shared<CollectiveWork>(std::move(inner), std::move(control), posted,
                                                 std::move(shape), group(), all, ports_));
  }

  Work start_message(Call call) {
    const Clock::time_point posted = Clock::now();
    const bool receives = call.operation == Operation::kRecv;
    const int peer = call.peer;
    const int tag = call.tag;
    const std::size_t link = link_to(peer);
    const at::Tensor told = at::empty({2}, at::kDouble);
    if (!receives) {
      const std::int64_t bytes = call.elements * call.row_bytes();
      auto* numbers = told.data_ptr<double>();
      numbers[0] = std::max(to_seconds(posted), ports_->sends_until[link]);
      numbers[1] = static_cast<double>(bytes) / ports_->network.links[link].bytes_per_s;
      occupy(link, numbers[0], bytes);
    }
    Work inner = inner_->start(std::move(call));
    Work control = receives ? control_->recv(told, peer, tag) : control_->send(told, peer, tag);
    return Work(std::make_shared<MessageWork>(std::move(inner), std::move(control), posted, receives, link,
                                              told, ports_));
  }

  std::size_t link_to(int peer) const { return node(peer) == node(rank()) ? 0 : 1; }

  // The sending port is busy from now on for calls that are posted before this one is waited for.
  void occupy(std::size_t link, double from, std::int64_t bytes) {
    double& sends_until = ports_->sends_until[link];
    sends_until =
        std::max(sends_until, from) + static_cast<double>(bytes) / ports_->network.links[link].bytes_per_s;
  }

  std::shared_ptr<Communicator> inner_;
  std::shared_ptr<Communicator> control_;
  std::shared_ptr<Ports> ports_;
};

}  // namespace

std::shared_ptr<Communicator> with_emulated_network(const std::shared_ptr<Communicator>& world,
                                                    const Network& network, const std::string& machine) {
  require_config(network.nodes * network.ranks_per_node == world->size(),
                 "network: nodes = {}x{}: that is {} ranks, the world has {}", network.nodes,
                 network.ranks_per_node, network.nodes * network.ranks_per_node, world->size());
  const std::vector<int> machines = Seats(*world, {}, machine).first_ranks();
  require_config(machines.size() == 1,
                 "network: ranks run on {} machines, whose clocks differ: one machine emulates it alone",
                 machines.size());
  auto ports = std::make_shared<Ports>();
  ports->network = network;
  return std::make_shared<EmulatedCommunicator>(world, std::move(ports));
}

}  // namespace collegium::comm
