// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>

#include "collegium/base/fields.h"

namespace collegium::optim {

enum class ScheduleKind { kConstant, kCosine, kWsd };

struct ScheduleOptions {
  ScheduleKind kind = ScheduleKind::kCosine;
  std::int64_t warmup_steps = 0;
  double final_ratio = 0.1;
  double decay_fraction = 0.2;
};
template <class Fields>
void describe(Fields& fields, ScheduleOptions& o) {
  fields("kind", o.kind, "constant; cosine; wsd (warm-up, stable, linear decay)");
  fields("warmup_steps", o.warmup_steps, "steps over which the rate rises linearly from 0");
  fields("final_ratio", o.final_ratio, "rate at the last step over the peak rate (cosine, wsd)");
  fields("decay_fraction", o.decay_fraction,
         "wsd: share of the steps, at the end, in which the rate decays; not before the warm-up is over");
}

/// Throws ConfigError naming the field (below `path`), its value and the rule.
void validate(const ScheduleOptions& options, std::int64_t num_steps, const std::string& path);

/// What     The factor on the peak learning rate at `step` (1 .. num_steps).
/// Math     warm-up: step / warmup; cosine: r + (1 - r) (1 + cos(pi t)) / 2, t from 0 to 1 after warm-up;
///          wsd: 1, then linear to r over the last decay_fraction of the steps, or as many as warm-up
///          leaves [Hu2024, Sec 4] arXiv 2404.06395.
double rate_factor(const ScheduleOptions& options, std::int64_t step, std::int64_t num_steps);

}  // namespace collegium::optim

namespace collegium {
template <>
struct EnumNames<optim::ScheduleKind> {
  static constexpr std::pair<std::string_view, optim::ScheduleKind> names[] = {
      {"constant", optim::ScheduleKind::kConstant},
      {"cosine", optim::ScheduleKind::kCosine},
      {"wsd", optim::ScheduleKind::kWsd}};
};
}  // namespace collegium
