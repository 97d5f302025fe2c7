// SPDX-License-Identifier: Apache-2.0
#pragma once

// The ways of data parallelism beside each other: a parameter server, an all-reduce, sharded states (ZeRO 1
// to 3).

#include <string>
#include <vector>

#include "collegium/plan/memory.h"
#include "collegium/plan/step_time.h"

namespace collegium::plan {

struct DataParallelVariant {
  std::string name;
  double sent_bytes = 0.0;  ///< by a rank in a step
  double busiest_bytes =
      0.0;  ///< in and out of the busiest machine's or rank's link: a central server's grow with dp*cp
  double exposed_s = 0.0;  ///< not hidden behind the backward pass
  double step_s = 0.0;
  double static_bytes = 0.0;  ///< of a rank
  double device_bytes = 0.0;
  bool fits = false;
};

/// What     Bytes, time and memory of a layout under each way of keeping its replicas equal.
/// Math     P parameters of a rank, g and w bytes of a gradient and of a weight, n replicas: dp*cp, of
///          experts the ranks that hold the same. Central server: dp*cp P (g + w) through one link; server on
///          every rank, and ZeRO 1: P (g + w) (n - 1)/n; ring all-reduce: 2 P g (n - 1)/n; ZeRO 2, of m
///          micro-batches: P (m g + w) (n - 1)/n; ZeRO 3: P (2 w + g) (n - 1)/n for every micro-batch.
/// Throws   ConfigError when the layout has one replica only.
std::vector<DataParallelVariant> data_parallel_variants(const ModelSpec& model, const Layout& layout,
                                                        const Workload& work, const Cluster& cluster,
                                                        const Stack& stack);
/// What     The variants as a table.
std::string format_data_parallel(const std::vector<DataParallelVariant>& variants, const Layout& layout,
                                 const Cluster& cluster);
/// The same for a program.
Json data_parallel_json(const std::vector<DataParallelVariant>& variants);

}  // namespace collegium::plan
