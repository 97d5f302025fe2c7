// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "collegium/base/units.h"
#include "collegium/plan/search.h"

namespace collegium::plan {

namespace {

constexpr std::size_t kShownReasons = 12;

std::string candidate_line(const Candidate& c, const ModelSpec& m, const Workload& w) {
  const double tokens = w.global_batch * w.seq_len / (c.time.step_s * c.layout.world());
  return fmt::format("  {:>9.4g} s{:>8.0f} TFLOP/s{:>9.0f} tok/s{:>8.1f} GiB{:>8.1f} GiB left  {}{}{}\n",
                     c.time.step_s, model_flops_per_s(m, c.layout, w, c.time.step_s) * 1e-12, tokens,
                     c.memory.device_bytes / kGiB, c.headroom_bytes / kGiB, layout_name(c.layout),
                     c.slower_because.empty() ? "" : "  | ", c.slower_because);
}

// Time against memory: a column per tenth of the front's range of time.
std::string front_picture(const std::vector<Candidate>& front, const Cluster& cluster) {
  constexpr int kHeight = 10;
  constexpr int kWidth = 60;
  if (front.size() < 2) return "";
  const double first = front.front().time.step_s;
  const double last = front.back().time.step_s;
  // Equal times have no axis to be drawn on.
  if (last <= first) return "";
  std::vector<std::string> canvas(kHeight, std::string(kWidth + 1, ' '));
  const double most = cluster.accelerator.memory_gib * kGiB;
  for (const Candidate& c : front) {
    const auto x = static_cast<std::size_t>((c.time.step_s - first) / (last - first) * kWidth);
    const auto y = static_cast<std::size_t>(std::clamp(c.memory.device_bytes / most, 0.0, 0.999) * kHeight);
    canvas[kHeight - 1 - y][x] = '*';
  }
  std::string text = fmt::format(
      "\nPareto front: memory per accelerator (0 to {:.0f} GiB, up) against step time ({:.3g} to {:.3g} s, "
      "right)\n",
      cluster.accelerator.memory_gib, first, last);
  for (const std::string& line : canvas) text.append("  |").append(line).append("\n");
  return text.append("  +").append(kWidth + 1, '-').append("\n");
}

}  // namespace

std::string format_search(const SearchResult& r, const ModelSpec& m, const Workload& w,
                          const Cluster& cluster, std::size_t rows) {
  std::string text = fmt::format(
      "{} layouts and modes of recomputation examined, {} layouts fit, each with the fastest mode that does; "
      "per accelerator: model TFLOP/s, tokens per second, device memory; "
      "behind the bar what costs most against the fastest\n",
      r.examined, r.fitting);
  if (r.ranked.empty()) text.append("  no layout fits\n");
  for (std::size_t i = 0; i < std::min(rows, r.ranked.size()); ++i) text += candidate_line(r.ranked[i], m, w);
  if (!r.front.empty()) {
    text.append("\nFastest for less memory (the Pareto front)\n");
    for (const Candidate& c : r.front) text += candidate_line(c, m, w);
    text += front_picture(r.front, cluster);
  }
  text.append("\nImpossible layouts, by reason\n");
  for (std::size_t i = 0; i < std::min(kShownReasons, r.rejected.size()); ++i)
    text += fmt::format("  {:>7} layouts: {} (for instance {})\n", r.rejected[i].layouts,
                        r.rejected[i].reason, r.rejected[i].example);
  if (r.rejected.size() > kShownReasons)
    text += fmt::format("  and {} more reasons (--json lists all)\n", r.rejected.size() - kShownReasons);
  return text;
}

Json search_json(const SearchResult& r, const ModelSpec& m, const Workload& w, std::size_t rows) {
  const auto list = [&](const std::vector<Candidate>& from, std::size_t most) {
    Json all = Json::array();
    for (std::size_t i = 0; i < std::min(most, from.size()); ++i) {
      const Candidate& c = from[i];
      Json busy = Json::object();
      for (std::size_t part = 0; part < kNumParts; ++part)
        busy[std::string(part_name(static_cast<Part>(part)))] = c.time.busy.seconds.at(part);
      all.push_back({{"layout", layout_name(c.layout)},
                     {"step_s", c.time.step_s},
                     {"model_flops_per_s", model_flops_per_s(m, c.layout, w, c.time.step_s)},
                     {"busy_s", busy},
                     {"bubble_s", c.time.bubble_s},
                     {"stage_imbalance_s", c.time.stage_imbalance_s},
                     {"pipeline_comm_s", c.time.pipeline_comm_s},
                     {"data_comm_s", c.time.data_comm_s},
                     {"optimizer_s", c.time.optimizer_s},
                     {"expert_comm_share", c.time.expert_comm_share()},
                     {"device_bytes", c.memory.device_bytes},
                     {"headroom_bytes", c.headroom_bytes},
                     {"slower_because", c.slower_because}});
    }
    return all;
  };
  Json rejected = Json::array();
  for (const Rejection& reason : r.rejected)
    rejected.push_back({{"reason", reason.reason}, {"layouts", reason.layouts}, {"example", reason.example}});
  return {{"examined", r.examined},
          {"fitting", r.fitting},
          {"ranked", list(r.ranked, rows)},
          {"front", list(r.front, r.front.size())},
          {"rejected", rejected}};
}

}  // namespace collegium::plan
