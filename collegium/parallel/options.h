// SPDX-License-Identifier: Apache-2.0
#pragma once

// How a run is laid out over ranks: the [parallel] table of a run file.

#include <cstdint>
#include <optional>

#include "collegium/base/fields.h"
#include "collegium/moe/dispatcher.h"

namespace collegium::parallel {

struct DispatcherChoice {
  std::optional<moe::DispatcherKind> kind;  ///< not set: chosen_dispatcher() (groups.h)
  bool combine_fp32 = false;                ///< of two_level and allgather
};
template <class Fields>
void describe(Fields& fields, DispatcherChoice& c) {
  fields(
      "kind", c.kind,
      "uneven (exactly the routed rows), padded (zeros up to the capacity or the largest count), "
      "allgather, two_level (a token crosses to a node once), shared_memory (ranks of one node read "
      "each other's rows where they lie), or auto (two_level where that is expected to halve what travels, "
      "else uneven)");
  fields("combine_fp32", c.combine_fp32, "two_level, allgather: partial sums travel in fp32");
}

struct ParallelOptions {
  std::int64_t ep = 0;
  DispatcherChoice dispatcher;
  moe::OverlapOptions overlap;
  bool overlap_gradients = false;
  double bucket_mib = 16.0;
  bool check_collectives = false;
};
template <class Fields>
void describe(Fields& fields, ParallelOptions& o) {
  fields("ep", o.ep,
         "expert parallelism: ranks that share the experts of a layer; divides the ranks; 1 = every rank "
         "holds all experts; 0 = the largest divisor of the ranks that does not exceed the experts");
  fields("dispatcher", o.dispatcher, "how rows reach their experts");
  fields("overlap", o.overlap, "what runs while rows travel");
  fields("overlap_gradients", o.overlap_gradients,
         "gradients are summed over ranks in buckets while the backward pass goes on");
  fields("bucket_mib", o.bucket_mib, "size of these buckets, MiB");
  fields("check_collectives", o.check_collectives,
         "compare operation, sizes and order across ranks before every collective (slower)");
}

/// What     The expert-parallel size that `options` gives for this many ranks.
/// Throws   ConfigError naming field, value, rule and the other number.
int resolve_ep(const ParallelOptions& options, int num_ranks, std::int64_t num_experts);
void validate(const ParallelOptions& options);

}  // namespace collegium::parallel
