// SPDX-License-Identifier: Apache-2.0
// Memory and step time as tables and pictures.
#include <algorithm>
#include <cmath>

#include "collegium/base/units.h"
#include "collegium/plan/memory.h"
#include "collegium/plan/step_time.h"

namespace collegium::plan {

namespace {

constexpr std::size_t kBarWidth = 72;

// A bar of one letter per component, as wide as its share of `whole`; what is more than the whole stands
// behind a mark.
std::string stacked_bar(const std::vector<std::pair<std::string, double>>& parts, double whole) {
  std::string bar;
  std::string over;
  std::string legend;
  double sum = 0.0;
  char letter = 'A';
  for (const auto& [name, value] : parts) {
    if (value <= 0.0) continue;
    sum += value;
    const auto end = static_cast<std::size_t>(std::lround(sum / whole * static_cast<double>(kBarWidth)));
    const std::size_t shown = std::min(end, kBarWidth);
    if (shown > bar.size()) bar.append(shown - bar.size(), letter);
    // Beyond the whole: at most a quarter of the bar, so that a hopeless layout still fits on a line.
    const std::size_t beyond = std::min(end, kBarWidth + kBarWidth / 4);
    if (beyond > kBarWidth) over.append(beyond - kBarWidth - over.size(), letter);
    legend += fmt::format("{} {}  ", letter, name);
    ++letter;
  }
  if (bar.size() < kBarWidth) bar.append(kBarWidth - bar.size(), '.');
  return fmt::format("  [{}]{}\n  {}\n", bar, over, legend);
}

}  // namespace

std::string format_memory(const MemoryReport& r, const Cluster& cluster) {
  std::string text = fmt::format("Memory of a rank of stage {} ({}, {:.1f} GiB)\n", r.stage,
                                 cluster.accelerator.name, cluster.accelerator.memory_gib);
  std::vector<std::pair<std::string, double>> parts;
  for (const MemoryLine& line : r.lines) {
    if (line.bytes <= 0.0) continue;
    text += fmt::format("  {:<34}{:>10.3f} GiB\n", line.component, line.bytes / kGiB);
    parts.emplace_back(line.component, line.bytes);
  }
  parts.emplace_back("fragmentation and context", r.device_bytes - r.peak_bytes);
  text += fmt::format("  {:<34}{:>10.3f} GiB\n  {:<34}{:>10.3f} GiB\n  {:<34}{:>10.3f} GiB  ({})\n", "static",
                      r.static_bytes / kGiB, "peak", r.peak_bytes / kGiB, "on the device, with context",
                      r.device_bytes / kGiB, fits(r, cluster) ? "fits" : "does not fit");
  return text + stacked_bar(parts, cluster.accelerator.memory_gib * kGiB);
}

std::vector<std::string> memory_assumptions(const Layout& l, const Workload& w, const Stack& s) {
  std::vector<std::string> all = {
      fmt::format("weights {} B, gradients {} B, optimizer state {} B per parameter; ZeRO stage {} over "
                  "{} replicas (experts: {})",
                  s.weight_bytes, s.gradient_bytes, s.optimizer_bytes, static_cast<int>(l.zero), l.replicas(),
                  l.expert_replicas()),
      fmt::format("recomputation: {}; attention {}; sequence parallelism {}", recompute_name(l.recompute),
                  s.flash_attention ? "fused (no scores kept)" : "keeps its scores",
                  l.sequence_parallel ? "on" : "off"),
      fmt::format("the fullest rank receives {:.2f} x the mean of the tokens", w.imbalance),
      "vocabulary padded to a multiple of 128 x tp; logits in 16 bits with an fp32 copy",
      fmt::format("fragmentation {:.0f} % of what is allocated, {:.1f} GB of driver context",
                  100.0 * s.fragmentation, kContextBytes * 1e-9)};
  return all;
}

std::string format_step(const StepTime& t) {
  std::string text = fmt::format(
      "Step time {:.4g} s: {:.0f} micro-batches, slowest stage {:.4g} s forward and {:.4g} s backward each\n",
      t.step_s, t.micro_batches, t.forward_s, t.backward_s);
  std::vector<std::pair<std::string, double>> parts;
  for (std::size_t i = 0; i < kNumParts; ++i)
    parts.emplace_back(part_name(static_cast<Part>(i)), t.busy.seconds.at(i));
  parts.emplace_back("waiting for the slowest stage", t.stage_imbalance_s);
  parts.emplace_back("pipeline bubble", t.bubble_s);
  parts.emplace_back("pipeline sends", t.pipeline_comm_s);
  parts.emplace_back("data parallelism, exposed", t.data_comm_s);
  parts.emplace_back("optimizer", t.optimizer_s);
  for (const auto& [name, seconds] : parts)
    text += fmt::format("  {:<34}{:>12.5f} s{:>8.1f} %\n", name, seconds, 100.0 * seconds / t.step_s);
  if (t.expert_comm_s > 0.0)
    text += fmt::format("  dispatch and combine, hidden or not: {:.4g} s, {:.1f} % of the step\n",
                        t.expert_comm_s, 100.0 * t.expert_comm_share());
  return text + stacked_bar(parts, t.step_s);
}

}  // namespace collegium::plan
