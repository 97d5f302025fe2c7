// SPDX-License-Identifier: Apache-2.0
#pragma once

// The classical published layouts beside what the planner would choose on the same machines.

#include <string>
#include <vector>

#include "collegium/plan/search.h"

namespace collegium::plan {

/// A layout as published, with the figures that do not add up pointed out.
struct ClassicLayout {
  std::string model;    ///< name in the catalogue
  std::string cluster;  ///< name in the catalogue
  std::string layout;   ///< as parse_layout() reads it
  double global_batch = 0.0;
  double seq_len = 2048;
  std::string precision = "bf16";
  std::string note;
};

/// What     Megatron-NLG 530B, BLOOM-176B, GLM-130B, OPT-175B and Megatron-175B.
const std::vector<ClassicLayout>& classic_layouts();

struct Comparison {
  ClassicLayout classic;
  Layout published;
  StepTime published_time;
  MemoryReport published_memory;
  bool published_fits = false;
  Candidate chosen;  ///< the search's fastest layout that fits, with the published run's software habits
  double gain() const { return published_time.step_s / chosen.time.step_s - 1.0; }
};

/// What     Predicts every classical layout and searches its machines for a faster one, under the same
///          software habits (full recomputation allowed, scores kept, 16-bit gradient reduction).
std::vector<Comparison> compare_classics();
/// What     The comparison as a table.
std::string format_comparison(const std::vector<Comparison>& all);
/// The same for a program.
Json comparison_json(const std::vector<Comparison>& all);

}  // namespace collegium::plan
