// SPDX-License-Identifier: Apache-2.0
#include "collegium/plan/simulator.h"

#include <algorithm>
#include <array>
#include <numeric>
#include <queue>

#include "collegium/base/error.h"

namespace collegium::plan {

namespace {

constexpr double kNever = -1.0;

// The state of one run. Times of finished passes are kept per (micro-batch, chunk); kNever = not finished.
class Run {
 public:
  Run(const Pipeline& p, const Durations& d)
      : p_(p),
        d_(d),
        orders_(fixed_order(p)),
        next_(static_cast<std::size_t>(p.ranks), 0),
        held_(static_cast<std::size_t>(p.ranks)),
        free_at_(static_cast<std::size_t>(p.ranks), 0.0),
        forward_done_(count(), kNever),
        backward_done_(count(), kNever) {
    result_.busy_s.assign(static_cast<std::size_t>(p.ranks), 0.0);
    result_.peak_chunks.assign(static_cast<std::size_t>(p.ranks), 0);
    if (orders_.empty()) collect_tasks();
  }

  Simulation run() {
    const std::size_t passes = p_.splits_backward() ? 3 : 2;
    const std::size_t total = count() * passes;
    std::priority_queue<double, std::vector<double>, std::greater<>> moments;
    moments.push(0.0);
    while (result_.spans.size() < total) {
      COLLEGIUM_CHECK(!moments.empty(), "{} of {} passes ran, and none can start", result_.spans.size(),
                      total);
      const double now = moments.top();
      while (!moments.empty() && moments.top() <= now) moments.pop();
      for (int rank = 0; rank < p_.ranks; ++rank) {
        while (free_at_[index(rank)] <= now && start_one(rank, now)) {
          moments.push(result_.spans.back().end_s);
          moments.push(result_.spans.back().end_s + d_.send_s);
        }
      }
    }
    result_.makespan_s = *std::max_element(free_at_.begin(), free_at_.end());
    return std::move(result_);
  }

 private:
  static std::size_t index(int i) { return static_cast<std::size_t>(i); }
  std::size_t count() const { return index(p_.micro_batches) * index(p_.chunks()); }
  std::size_t slot(const Task& t) const { return index(t.micro_batch) * index(p_.chunks()) + index(t.chunk); }
  // Rule-based schedules: every task of a rank, oldest micro-batch first.
  void collect_tasks() {
    pending_.resize(index(p_.ranks));
    for (int micro = 0; micro < p_.micro_batches; ++micro) {
      for (int chunk = 0; chunk < p_.chunks(); ++chunk) {
        for (const Pass pass : {Pass::kBackward, Pass::kForward, Pass::kWeights}) {
          const Task task{pass, micro, chunk};
          pending_[index(p_.rank_of(task))].push_back(task);
        }
      }
    }
    for (auto& tasks : pending_) {
      std::stable_sort(tasks.begin(), tasks.end(),
                       [](const Task& a, const Task& b) { return order(a) < order(b); });
    }
  }
  static int order(const Task& t) {
    return t.pass == Pass::kBackward ? 0 : (t.pass == Pass::kForward ? 1 : 2);
  }

  bool ready(const Task& t, double now) const {
    const auto after = [&](double done, double delay) {
      return done != kNever && done + delay <= now + 1e-15;
    };
    if (t.pass == Pass::kWeights) return after(backward_done_[slot(t)], 0.0);
    if (t.pass == Pass::kForward)
      return t.chunk == 0 || after(forward_done_[slot({t.pass, t.micro_batch, t.chunk - 1})], d_.send_s);
    if (!after(forward_done_[slot(t)], 0.0)) return false;
    return t.chunk == p_.chunks() - 1 ||
           after(backward_done_[slot({t.pass, t.micro_batch, t.chunk + 1})], d_.send_s);
  }

  bool start_one(int rank, double now) {
    if (!orders_.empty()) {
      const std::vector<Task>& order = orders_[index(rank)];
      if (next_[index(rank)] >= order.size() || !ready(order[next_[index(rank)]], now)) return false;
      start(rank, order[next_[index(rank)]++], now);
      return true;
    }
    std::vector<Task>& tasks = pending_[index(rank)];
    for (auto task = tasks.begin(); task != tasks.end(); ++task) {
      if (task->pass == Pass::kForward &&
          held_[index(rank)].at(index(p_.direction_of(*task))) >= p_.most_in_flight(*task))
        continue;
      if (!ready(*task, now)) continue;
      const Task chosen = *task;
      tasks.erase(task);
      start(rank, chosen, now);
      return true;
    }
    return false;
  }

  void start(int rank, const Task& t, double now) {
    double seconds = 0.0;
    if (t.pass == Pass::kForward) {
      seconds = d_.forward(t);
      forward_done_[slot(t)] = now + seconds;
      auto& held = held_[index(rank)];
      ++held.at(index(p_.direction_of(t)));
      result_.peak_chunks[index(rank)] = std::max(result_.peak_chunks[index(rank)], held[0] + held[1]);
    } else if (t.pass == Pass::kBackward) {
      seconds = d_.backward(t);
      backward_done_[slot(t)] = now + seconds;
      --held_[index(rank)].at(index(p_.direction_of(t)));
    } else {
      seconds = d_.weights(t);
    }
    // Time that is not a number would never pass.
    COLLEGIUM_CHECK(seconds >= 0.0, "micro-batch {}, chunk {}: a pass of {} s", t.micro_batch, t.chunk,
                    seconds);
    free_at_[index(rank)] = now + seconds;
    result_.busy_s[index(rank)] += seconds;
    result_.spans.push_back({rank, now, now + seconds, t});
  }

  const Pipeline& p_;
  const Durations& d_;
  std::vector<std::vector<Task>> orders_;
  std::vector<std::vector<Task>> pending_;
  std::vector<std::size_t> next_;
  std::vector<std::array<int, 2>> held_;  // by direction
  std::vector<double> free_at_;
  std::vector<double> forward_done_;
  std::vector<double> backward_done_;
  Simulation result_;
};

}  // namespace

double Simulation::bubble_share() const {
  const double busy = std::accumulate(busy_s.begin(), busy_s.end(), 0.0);
  return 1.0 - busy / (makespan_s * static_cast<double>(busy_s.size()));
}

Simulation simulate(const Pipeline& pipeline, const Durations& durations) {
  return Run(pipeline, durations).run();
}

}  // namespace collegium::plan
