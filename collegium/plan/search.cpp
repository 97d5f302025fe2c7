// SPDX-License-Identifier: Apache-2.0
#include "collegium/plan/search.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <map>
#include <utility>

#include "collegium/base/error.h"
#include "collegium/base/units.h"

namespace collegium::plan {

namespace {

constexpr int kMaxMicroBatch = 8;
constexpr int kMaxVirtualStages = 8;
constexpr int kMaxExpertTensor = 8;

std::vector<int> divisors(std::int64_t n, std::int64_t limit) {
  std::vector<int> all;
  for (std::int64_t d = 1; d <= std::min(n, limit); ++d) {
    if (n % d == 0) all.push_back(static_cast<int>(d));
  }
  return all;
}

class Search {
 public:
  Search(const ModelSpec& m, const Workload& w, const Cluster& c, const Stack& s, const SearchOptions& o)
      : m_(m), w_(w), c_(c), s_(s), o_(o) {}

  SearchResult run() {
    for (const int tp : divisors(o_.accelerators, std::max(16, c_.fast_domain))) {
      if (tp > 16) break;
      for (const int cp : divisors(o_.accelerators / tp, 16)) {
        for (const int pp : divisors(o_.accelerators / (tp * cp), m_.layers)) shape(tp, cp, pp);
      }
    }
    finish();
    return std::move(result_);
  }

 private:
  void reject(std::string reason, const Layout& layout, double over_gib = 0.0) {
    const auto [at, fresh] = index_.emplace(std::move(reason), result_.rejected.size());
    if (fresh) result_.rejected.push_back({at->first, over_gib, 0, layout_name(layout)});
    ++result_.rejected[at->second].layouts;
  }

  void shape(int tp, int cp, int pp) {
    Layout l;
    l.tp = tp;
    l.cp = cp;
    l.pp = pp;
    l.dp = o_.accelerators / (tp * cp * pp);
    l.sequence_parallel = o_.sequence_parallel && tp > 1;
    // Context parallelism pays where one sequence does not fit; short sequences only lose by it.
    if (cp > 1 && w_.seq_len / cp < 2048)
      return reject("cp: less than 2,048 positions would be left per rank", l);
    const int stage_ranks = l.dp * cp * tp;
    for (const int ep : m_.is_moe() ? divisors(m_.experts, stage_ranks) : std::vector<int>{1}) {
      for (const int etp : m_.is_moe() ? divisors(stage_ranks, kMaxExpertTensor) : std::vector<int>{1}) {
        l.ep = ep;
        l.etp = etp;
        if (stage_ranks % (ep * etp) == 0) micro_batches(l);
      }
    }
  }

  void micro_batches(Layout l) {
    for (l.micro_batch = 1; l.micro_batch <= kMaxMicroBatch; l.micro_batch *= 2) {
      const int most = l.pp > 1 ? kMaxVirtualStages : 1;
      for (l.virtual_stages = 1; l.virtual_stages <= most; l.virtual_stages *= 2) {
        l.schedule = l.virtual_stages > 1 ? Schedule::kInterleaved : Schedule::k1F1B;
        if (l.pp * l.virtual_stages > m_.layers) break;
        if (auto reason = forbidden(m_, l, w_)) {
          ++result_.examined;
          reject(std::move(*reason), l);
          continue;
        }
        schedules(l);
      }
    }
  }

  void schedules(Layout l) {
    choices(l);
    if (!o_.vary_schedule || l.pp == 1 || l.virtual_stages > 1) return;
    for (const Schedule schedule : {Schedule::kZeroBubble, Schedule::kDualPipe}) {
      l.schedule = schedule;
      if (!forbidden(m_, l, w_)) choices(l);
    }
  }

  // Modes that only trade memory for time: the first that fits of each ZeRO stage is the fastest of that
  // stage and ranked; the others may be on the front.
  void choices(Layout l) {
    for (const Zero zero : {Zero::kOptimizer, Zero::kGradients, Zero::kSharded}) {
      if (zero != Zero::kOptimizer && (l.replicas() == 1 || l.pp > 1)) continue;
      l.zero = zero;
      double smallest = 0.0;
      bool fitted = false;
      for (const Recompute& recompute :
           {Recompute{}, Recompute{.norms = true, .activation = true}, Recompute{.full = true}}) {
        l.recompute = recompute;
        ++result_.examined;
        MemoryReport memory = worst_memory(m_, l, w_, c_, s_);
        smallest = memory.device_bytes;
        // Stricter than fits(): a layout that is to be chosen leaves the allocator its fragmentation.
        if (memory.device_bytes > c_.accelerator.memory_gib * kGiB) continue;
        if (fitted) {
          spare_.push_back({l, memory.device_bytes, result_.ranked.back().time.step_s});
          continue;
        }
        fitted = true;
        ++result_.fitting;
        result_.ranked.push_back(with_fastest_dispatcher(l, std::move(memory)));
      }
      if (!fitted) {
        const double have = c_.accelerator.memory_gib * kGiB;
        const double over = std::ceil((smallest - have) / kGiB / 20.0) * 20.0;
        reject(fmt::format(
                   "memory: up to {:.0f} GiB more than the {:.0f} GiB of {}, even with full recomputation",
                   over, c_.accelerator.memory_gib, c_.accelerator.name),
               l, over);
      }
    }
  }

  Candidate with_fastest_dispatcher(Layout l, MemoryReport memory) const {
    std::vector<Dispatcher> kinds = {Dispatcher::kAllToAll};
    if (o_.vary_dispatcher && l.ep > 1)
      kinds = {Dispatcher::kAllToAll, Dispatcher::kDeduplicated, Dispatcher::kHierarchical};
    Candidate best;
    for (const Dispatcher kind : kinds) {
      l.dispatcher = kind;
      StepTime time = step_time(m_, l, w_, c_, s_);
      if (best.time.step_s > 0.0 && time.step_s >= best.time.step_s) continue;
      best.layout = l;
      best.time = time;
    }
    best.headroom_bytes = c_.accelerator.memory_gib * kGiB - memory.device_bytes;
    best.memory = std::move(memory);
    return best;
  }

  // Seconds by part, the pipeline's and data parallelism's included.
  static std::vector<std::pair<std::string, double>> parts(const StepTime& t) {
    std::vector<std::pair<std::string, double>> all;
    for (std::size_t i = 0; i < kNumParts; ++i)
      all.emplace_back(part_name(static_cast<Part>(i)), t.busy.seconds.at(i));
    all.emplace_back("slowest stage", t.stage_imbalance_s);
    all.emplace_back("pipeline bubble", t.bubble_s);
    all.emplace_back("pipeline sends", t.pipeline_comm_s);
    all.emplace_back("data parallelism", t.data_comm_s);
    all.emplace_back("optimizer", t.optimizer_s);
    return all;
  }

  // Of equally fast ones the smallest comes first: it alone is on the front.
  static void sort_by_time(std::vector<Candidate>& all) {
    std::sort(all.begin(), all.end(), [](const Candidate& a, const Candidate& b) {
      return std::pair(a.time.step_s, a.memory.device_bytes) <
             std::pair(b.time.step_s, b.memory.device_bytes);
    });
  }

  // Leaves what no faster one is as small as.
  static void keep_front(std::vector<Candidate>& all) {
    sort_by_time(all);
    double least = std::numeric_limits<double>::infinity();
    std::erase_if(all, [&](const Candidate& c) {
      const bool beaten = c.memory.device_bytes >= least;
      least = std::min(least, c.memory.device_bytes);
      return beaten;
    });
  }

  // The ranked ones, and of the spare modes those that are not beaten. Most are so by what their layout takes
  // with less recomputation, and need no time of their own.
  void find_front() {
    std::vector<Candidate>& front = result_.front;
    front = result_.ranked;
    keep_front(front);
    const auto beaten = [&](double seconds, double bytes) {
      return std::any_of(front.begin(), front.end(), [&](const Candidate& c) {
        return c.time.step_s <= seconds && c.memory.device_bytes <= bytes;
      });
    };
    for (const Spare& spare : spare_) {
      if (beaten(spare.least_s, spare.device_bytes)) continue;
      Candidate c = with_fastest_dispatcher(spare.layout, worst_memory(m_, spare.layout, w_, c_, s_));
      if (!beaten(c.time.step_s, spare.device_bytes)) front.push_back(std::move(c));
    }
    keep_front(front);
  }

  void finish() {
    std::vector<Candidate>& all = result_.ranked;
    sort_by_time(all);
    find_front();
    if (all.size() > o_.keep) all.resize(o_.keep);
    sort_rejected();
    if (all.empty()) return;
    const auto fastest = parts(all.front().time);
    for (std::vector<Candidate>* list : {&all, &result_.front}) {
      for (Candidate& c : *list) explain(c, fastest);
    }
  }

  void sort_rejected() {
    const bool nothing_fits = result_.ranked.empty();
    const auto rank = [&](const Rejection& r) {
      // A user for whom nothing fits asks how much is missing.
      const double missing = r.over_gib > 0.0 ? r.over_gib : std::numeric_limits<double>::infinity();
      return std::pair(nothing_fits ? missing : 0.0, -static_cast<double>(r.layouts));
    };
    std::stable_sort(result_.rejected.begin(), result_.rejected.end(),
                     [&](const Rejection& a, const Rejection& b) { return rank(a) < rank(b); });
  }

  static void explain(Candidate& c, const std::vector<std::pair<std::string, double>>& fastest) {
    const auto own = parts(c.time);
    double most = 0.0;
    for (std::size_t i = 0; i < own.size(); ++i) {
      const double more = own[i].second - fastest[i].second;
      if (more <= most) continue;
      most = more;
      c.slower_because = fmt::format("{} +{:.3g} s", own[i].first, more);
    }
  }

  const ModelSpec& m_;
  const Workload& w_;
  const Cluster& c_;
  const Stack& s_;
  const SearchOptions& o_;
  // A mode that fits beside a ranked one of the same layout, which is faster.
  struct Spare {
    Layout layout;
    double device_bytes = 0.0;
    double least_s = 0.0;
  };

  SearchResult result_;
  std::vector<Spare> spare_;
  std::map<std::string, std::size_t> index_;
};

}  // namespace

SearchResult search(const ModelSpec& model, const Workload& work, const Cluster& cluster, const Stack& stack,
                    const SearchOptions& options) {
  require_config(options.accelerators >= 1, "--gpus = {}: must be at least 1", options.accelerators);
  check_workload(work, "--");
  peak_flops(cluster.accelerator, work.precision);
  return Search(model, work, cluster, stack, options).run();
}

}  // namespace collegium::plan
