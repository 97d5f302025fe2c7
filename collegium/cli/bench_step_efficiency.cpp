// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "collegium/cli/bench_step.h"

namespace collegium::cli {

double measure_step_efficiency(const plan::Cluster& cluster,
                               const std::shared_ptr<comm::Communicator>& world) {
  constexpr double kSeconds = 3.0;
  // Between the demo's shape and those of `bench step`; as many experts on every rank.
  constexpr std::int64_t kExperts = 8;
  StepBenchOptions o;
  o.layers = 2;
  o.hidden = 384;
  o.heads = 6;
  o.ffn = 512;
  o.experts = (kExperts + world->size() - 1) / world->size() * world->size();
  o.vocab = 4096;
  o.sequences = std::max<std::int64_t>(8, std::int64_t{2} * world->size());
  o.length = 256;
  o.routing = "forced";
  const StepBenchResult result = run_step_bench(step_bench_config(o), kSeconds, world);
  if (world->rank() != 0) return 0.0;
  const plan::StepTime planned = plan::own_step(result.run, cluster);
  const double computed = plan::computation_seconds(planned);
  const double left = result.seconds.median - (planned.step_s - computed);
  // Where communication was planned to take (nearly) the whole step, nothing is known of the rest.
  constexpr double kLeast = 0.1;
  constexpr double kMost = 2.0;
  return left < kLeast * result.seconds.median ? 0.0 : std::min(kMost, computed / left);
}

}  // namespace collegium::cli
