// SPDX-License-Identifier: Apache-2.0
#include "collegium/plan/compare.h"

#include "collegium/base/units.h"
#include "collegium/plan/published.h"

namespace collegium::plan {

const std::vector<ClassicLayout>& classic_layouts() {
  static const std::vector<ClassicLayout> all = {
      {"megatron-nlg-530b", "a100-80", "tp8.pp35.dp16.mb1.zero0.full", 1920, 2048, "bf16",
       "4,480 accelerators; the batch is quoted as 1960, which dp = 16 does not divide, and elsewhere as "
       "1920, used here"},
      {"bloom-176b", "jean-zay-a100", "tp4.pp12.dp8.mb2.zero1.full", 2048, 2048, "bf16", "384 accelerators"},
      {"glm-130b", "a100-40", "tp4.pp8.dp24.mb1.zero1.full", 4224, 2048, "fp16", "768 accelerators"},
      {"opt-175b", "a100-80", "tp8.pp1.dp124.mb8.zero3.full", 992, 2048, "fp16",
       "992 accelerators, often printed as 996, which tp = 8 does not divide; sharded data parallelism"},
      {"megatron-175b", "a100-80", "tp8.pp16.dp8.mb1.zero0.full", 1536, 2048, "fp16",
       "1,024 accelerators; tp and pp are published, dp = 8 and the batch of 1536 are those of its scaling "
       "study"}};
  return all;
}

std::vector<Comparison> compare_classics() {
  std::vector<Comparison> all;
  for (const ClassicLayout& classic : classic_layouts()) {
    const ModelSpec model = load_model(classic.model);
    const Cluster cluster = load_cluster(classic.cluster);
    const Workload work{
        .seq_len = classic.seq_len, .global_batch = classic.global_batch, .precision = classic.precision};
    // The software of 2021: scores kept, gradients reduced after the backward pass.
    Stack stack = stack_of("NVIDIA/Megatron-LM@50a4b5fa02", classic.precision);
    Comparison c;
    c.classic = classic;
    c.published = parse_layout(classic.layout);
    c.published.sequence_parallel = false;
    c.published_time = step_time(model, c.published, work, cluster, stack);
    c.published_memory = worst_memory(model, c.published, work, cluster, stack);
    c.published_fits = fits(c.published_memory, cluster);
    const SearchResult found =
        search(model, work, cluster, stack,
               {.accelerators = c.published.world(), .sequence_parallel = false, .keep = 1});
    if (!found.ranked.empty()) c.chosen = found.ranked.front();
    all.push_back(std::move(c));
  }
  return all;
}

std::string format_comparison(const std::vector<Comparison>& all) {
  std::string text =
      "Classical layouts as published, and what the planner would choose on the same machines with the same "
      "software\n";
  for (const Comparison& c : all) {
    const Workload work{.seq_len = c.classic.seq_len,
                        .global_batch = c.classic.global_batch,
                        .precision = c.classic.precision};
    const ModelSpec model = load_model(c.classic.model);
    const auto line = [&](const char* who, const Layout& l, const StepTime& t, const MemoryReport& memory) {
      return fmt::format("  {:<10}{:<66}{:>9.2f} s{:>7.0f} TFLOP/s{:>8.1f} GiB\n", who, layout_name(l),
                         t.step_s, model_flops_per_s(model, l, work, t.step_s) * 1e-12,
                         memory.device_bytes / kGiB);
    };
    text += fmt::format("{} on {} x {}, batch {} x {}: {}\n", c.classic.model, c.published.world(),
                        c.classic.cluster, c.classic.global_batch, c.classic.seq_len, c.classic.note);
    text += line("published", c.published, c.published_time, c.published_memory);
    if (!c.published_fits) text += "            (predicted not to fit)\n";
    if (c.chosen.time.step_s <= 0.0) {
      text += "  chosen    no layout fits\n";
      continue;
    }
    text += line("chosen", c.chosen.layout, c.chosen.time, c.chosen.memory);
    text += fmt::format("  predicted gain {:.1f} % (tokens per second)\n", 100.0 * c.gain());
  }
  return text;
}

Json comparison_json(const std::vector<Comparison>& all) {
  Json list = Json::array();
  for (const Comparison& c : all)
    list.push_back({{"model", c.classic.model},
                    {"cluster", c.classic.cluster},
                    {"accelerators", c.published.world()},
                    {"global_batch", c.classic.global_batch},
                    {"note", c.classic.note},
                    {"published", layout_name(c.published)},
                    {"published_step_s", c.published_time.step_s},
                    {"published_device_bytes", c.published_memory.device_bytes},
                    {"chosen", layout_name(c.chosen.layout)},
                    {"chosen_step_s", c.chosen.time.step_s},
                    {"chosen_device_bytes", c.chosen.memory.device_bytes},
                    {"gain", c.gain()}});
  return list;
}

}  // namespace collegium::plan
