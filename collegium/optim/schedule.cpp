// SPDX-License-Identifier: Apache-2.0
#include "collegium/optim/schedule.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "collegium/base/error.h"

namespace collegium::optim {

void validate(const ScheduleOptions& o, std::int64_t num_steps, const std::string& path) {
  require_config(o.warmup_steps >= 0 && o.warmup_steps <= num_steps,
                 "{}.warmup_steps = {}: must lie between 0 and train.steps = {}", path, o.warmup_steps,
                 num_steps);
  require_config(o.final_ratio >= 0.0 && o.final_ratio <= 1.0, "{}.final_ratio = {}: must lie in [0, 1]",
                 path, o.final_ratio);
  require_config(o.decay_fraction >= 0.0 && o.decay_fraction <= 1.0,
                 "{}.decay_fraction = {}: must lie in [0, 1]", path, o.decay_fraction);
}

double rate_factor(const ScheduleOptions& o, std::int64_t step, std::int64_t num_steps) {
  if (step <= o.warmup_steps) return static_cast<double>(step) / static_cast<double>(o.warmup_steps);
  const auto after = static_cast<double>(step - o.warmup_steps);
  const auto length = static_cast<double>(std::max<std::int64_t>(1, num_steps - o.warmup_steps));
  switch (o.kind) {
    case ScheduleKind::kConstant:
      return 1.0;
    case ScheduleKind::kCosine: {
      const double t = std::min(1.0, after / length);
      return o.final_ratio + (1.0 - o.final_ratio) * 0.5 * (1.0 + std::cos(std::numbers::pi * t));
    }
    case ScheduleKind::kWsd: {
      const double decay_steps = std::min(o.decay_fraction * static_cast<double>(num_steps), length);
      const double remaining = static_cast<double>(num_steps - step);
      if (remaining >= decay_steps) return 1.0;
      return o.final_ratio + (1.0 - o.final_ratio) * remaining / decay_steps;
    }
  }
  return 1.0;
}

}  // namespace collegium::optim
