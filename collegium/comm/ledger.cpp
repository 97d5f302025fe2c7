// SPDX-License-Identifier: Apache-2.0
#include "collegium/comm/ledger.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <array>
#include <functional>
#include <numeric>

#include "collegium/comm/agreement.h"
#include "collegium/comm/errors.h"

namespace collegium::comm {

namespace {

double seconds(Clock::duration duration) { return std::chrono::duration<double>(duration).count(); }

// A wait for what is compared fails in the name of the call that it is for.
void wait_for(Work& comparison, const std::string& call) {
  const auto named = [&](const std::exception& error) {
    return fmt::format("{}, when it was compared: {}", call, error.what());
  };
  try {
    comparison.wait();
  } catch (const PeerFailure&) {
    throw;
  } catch (const NoAnswer& error) {
    throw NoAnswer(named(error), error.num_missing());
  } catch (const CommError& error) {
    throw CommError(named(error));
  }
}

class LedgerWork final : public Work::State {
 public:
  LedgerWork(Work inner, LedgerKey key, std::shared_ptr<Ledger> ledger, std::function<void()> compare)
      : inner_(std::move(inner)),
        key_(std::move(key)),
        ledger_(std::move(ledger)),
        compare_(std::move(compare)) {}

  void wait() override {
    if (waited_) return;
    const Clock::time_point begin = Clock::now();
    if (compare_) compare_();
    inner_.wait();
    ledger_->add_times(key_, inner_.timeline(), begin, Clock::now());
    waited_ = true;
  }
  bool done() override { return inner_.done(); }
  Timeline timeline() const override { return inner_.timeline(); }

 private:
  Work inner_;
  LedgerKey key_;
  std::shared_ptr<Ledger> ledger_;
  std::function<void()> compare_;
  bool waited_ = false;
};

class LedgerCommunicator final : public Communicator {
 public:
  LedgerCommunicator(std::shared_ptr<Communicator> inner, std::shared_ptr<Ledger> ledger,
                     LedgerOptions options)
      : Communicator(inner->group()),
        inner_(std::move(inner)),
        ledger_(std::move(ledger)),
        options_(options) {
    if (options_.check) check_ = inner_->split(0, inner_->rank(), inner_->name() + " (check)");
  }

  Work start(Call call) override {
    std::function<void()> compare;
    if (options_.check && is_point_to_point(call.operation)) {
      compare = check_message(call, describe_call(call, group(), next_message_++));
    } else if (options_.check) {
      check_collective(call, describe_call(call, group(), next_call_++));
    }
    const LedgerKey key = {.step = call.where.step,
                           .layer = call.where.layer,
                           .phase = call.where.phase,
                           .axis = name(),
                           .operation = call.operation};
    std::int64_t within = 0;
    std::int64_t between = 0;
    const std::vector<std::int64_t> bytes = bytes_to_ranks(call, group());
    for (int r = 0; r < size(); ++r)
      (node(r) == node(rank()) ? within : between) += bytes[static_cast<std::size_t>(r)];
    ledger_->add_call(key, within, between);
    return Work(
        std::make_shared<LedgerWork>(inner_->start(std::move(call)), key, ledger_, std::move(compare)));
  }

  std::shared_ptr<Communicator> split(int color, int key, const std::string& name) override {
    auto inner = inner_->split(color, key, name);
    return inner ? with_ledger(std::move(inner), ledger_, options_) : nullptr;
  }

 private:
  at::Tensor packed(const Call& call) const {
    const std::vector<std::int64_t> numbers = pack_call(call, size());
    const at::Tensor tensor = at::empty({1, static_cast<std::int64_t>(numbers.size())}, at::kLong);
    std::copy(numbers.begin(), numbers.end(), tensor.data_ptr<std::int64_t>());
    return tensor;
  }

  Call unpacked(const at::Tensor& packed, std::int64_t row) const {
    const auto* numbers = packed.data_ptr<std::int64_t>() + row * packed.size(1);
    return unpack_call({numbers, static_cast<std::size_t>(packed.size(1))}, size());
  }

  void check_collective(const Call& call, const std::string& name) {
    const WhereScope scope(where(), call.where);
    const at::Tensor own = packed(call);
    const at::Tensor all = at::empty({size(), own.size(1)}, at::kLong);
    Work exchange = check_->all_gather(own, all);
    wait_for(exchange, name);
    std::vector<Call> calls;
    std::vector<int> ranks(static_cast<std::size_t>(size()));
    std::iota(ranks.begin(), ranks.end(), 0);
    for (int r = 0; r < size(); ++r) calls.push_back(unpacked(all, r));
    std::vector<const Call*> pointers;
    for (const Call& other : calls) pointers.push_back(&other);
    if (const auto disagreement = find_disagreement(group(), ranks, pointers)) throw CommError(*disagreement);
  }

  // The sender's numbers travel beside the message, and the receiver compares before it waits for the message
  // itself; not earlier, because ranks may post what they receive before what they send.
  std::function<void()> check_message(const Call& call, const std::string& name) {
    if (call.operation == Operation::kSend) {
      auto header = std::make_shared<Work>(check_->send(packed(call), call.peer, call.tag));
      return [header, name] { wait_for(*header, name); };
    }
    const at::Tensor header = at::empty({1, static_cast<std::int64_t>(packed_call_size(size()))}, at::kLong);
    auto work = std::make_shared<Work>(check_->recv(header, call.peer, call.tag));
    Call own = call;
    own.output = at::Tensor();
    return [this, self = shared_from_this(), work, header, own, name] {
      wait_for(*work, name);
      const Call sent = unpacked(header, 0);
      const std::array<int, 2> ranks = {own.peer, rank()};
      const std::array<const Call*, 2> calls = {&sent, &own};
      if (const auto disagreement = find_disagreement(group(), ranks, calls)) throw CommError(*disagreement);
    };
  }

  std::shared_ptr<Communicator> inner_;
  std::shared_ptr<Communicator> check_;
  std::shared_ptr<Ledger> ledger_;
  LedgerOptions options_;
  std::uint64_t next_call_ = 0;  // of those that are compared, as the inner one counts
  std::uint64_t next_message_ = 0;
};

}  // namespace

void Ledger::add_call(const LedgerKey& key, std::int64_t within, std::int64_t between) {
  LedgerEntry& entry = entries_[key];
  ++entry.calls;
  entry.bytes_within_nodes += within;
  entry.bytes_between_nodes += between;
}

void Ledger::add_times(const LedgerKey& key, const Timeline& timeline, Clock::time_point wait_begin,
                       Clock::time_point wait_end) {
  LedgerEntry& entry = entries_[key];
  entry.transfer_s += seconds(timeline.done - timeline.began);
  entry.skew_s += seconds(timeline.ready - timeline.posted);
  entry.waiting_s += seconds(wait_end - wait_begin);
  transfers_.push_back(
      {.operation = key.operation, .interval = {.begin = timeline.began, .end = timeline.done}});
  waits_.push_back({.begin = wait_begin, .end = wait_end});
}

void Ledger::clear() {
  entries_.clear();
  transfers_.clear();
  waits_.clear();
}

Ledger::Intervals Ledger::merge(Intervals intervals) {
  std::sort(intervals.begin(), intervals.end(),
            [](const auto& a, const auto& b) { return a.begin < b.begin; });
  Intervals merged;
  for (const Interval& interval : intervals) {
    if (!merged.empty() && interval.begin <= merged.back().end) {
      merged.back().end = std::max(merged.back().end, interval.end);
    } else if (interval.begin < interval.end) {
      merged.push_back(interval);
    }
  }
  return merged;
}

Overlap Ledger::overlap_of(Intervals transfers) const {
  const Intervals moving = merge(std::move(transfers));
  const Intervals waiting = merge(waits_);
  Overlap overlap;
  auto wait = waiting.begin();
  for (const Interval& transfer : moving) {
    double exposed = 0.0;
    while (wait != waiting.end() && wait->end <= transfer.begin) ++wait;
    for (auto w = wait; w != waiting.end() && w->begin < transfer.end; ++w)
      exposed += seconds(std::min(w->end, transfer.end) - std::max(w->begin, transfer.begin));
    overlap.communicating_s += seconds(transfer.end - transfer.begin);
    overlap.hidden_s += seconds(transfer.end - transfer.begin) - exposed;
  }
  return overlap;
}

Overlap Ledger::overlap() const {
  Intervals intervals;
  for (const Transfer& transfer : transfers_) intervals.push_back(transfer.interval);
  return overlap_of(std::move(intervals));
}

Overlap Ledger::overlap(Operation operation) const {
  Intervals intervals;
  for (const Transfer& transfer : transfers_) {
    if (transfer.operation == operation) intervals.push_back(transfer.interval);
  }
  return overlap_of(std::move(intervals));
}

std::shared_ptr<Communicator> with_ledger(std::shared_ptr<Communicator> inner, std::shared_ptr<Ledger> ledger,
                                          const LedgerOptions& options) {
  return std::make_shared<LedgerCommunicator>(std::move(inner), std::move(ledger), options);
}

}  // namespace collegium::comm
