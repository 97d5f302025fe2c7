// SPDX-License-Identifier: Apache-2.0
#pragma once

// metrics.jsonl: one JSON object a line, a record per optimizer step ("kind": "step"), per validation
// ("validation") and at the end of a run what the planner says of it ("planner").

#include <cstdio>
#include <filesystem>
#include <memory>
#include <string>

#include "collegium/base/fields.h"
#include "collegium/train/trainer.h"
#include "collegium/train/validation.h"

namespace collegium::train {

/// How fast a step was, beside the machine's bound.
struct StepSpeed {
  double seconds = 0.0;
  double tokens_per_s = 0.0;
  double share_of_gemm_peak = 0.0;
};

class MetricsWriter {
 public:
  /// What     Opens RUN/metrics.jsonl for appending, without the records after `last_step`: a killed run
  ///          may have written steps that its last checkpoint does not hold, and will write them again.
  MetricsWriter(const std::filesystem::path& run_folder, std::int64_t last_step);

  void write(const StepReport& report, const StepSpeed& speed);
  /// Does nothing when this step was validated before: a resumed run sees the same weights.
  /// `domains` names those of the result.
  void write(std::int64_t step, const ValidationResult& validation, const std::vector<std::string>& domains);
  void write(std::int64_t step, const std::vector<PredictedFigure>& comparison);

 private:
  void append(const Json& record);
  std::string records_until(std::int64_t last_step);

  struct Close {
    void operator()(std::FILE* file) const { std::fclose(file); }
  };
  std::filesystem::path path_;
  std::int64_t last_validation_ = -1;  ///< step of the newest validation record that was kept
  std::unique_ptr<std::FILE, Close> file_;
};

}  // namespace collegium::train
