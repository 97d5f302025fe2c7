// SPDX-License-Identifier: Apache-2.0
#pragma once

// Every legal layout of a model on a number of accelerators, the ones that fit ranked by predicted step time,
// and for each of the others why not.

#include <string>
#include <vector>

#include "collegium/plan/memory.h"
#include "collegium/plan/step_time.h"

namespace collegium::plan {

struct SearchOptions {
  int accelerators = 8;
  bool sequence_parallel = true;
  bool vary_dispatcher = true;
  bool vary_schedule = false;  ///< zero-bubble and DualPipe beside 1F1B and interleaving
  std::size_t keep = 200;      ///< candidates kept, the fastest first
};

struct Candidate {
  Layout layout;
  StepTime time;
  MemoryReport memory;
  double headroom_bytes = 0.0;  ///< device memory left
  std::string slower_because;   ///< the part that costs most against the fastest candidate
};

/// Layouts that were not ranked, by reason.
struct Rejection {
  std::string reason;
  double over_gib = 0.0;  ///< device memory that is missing at most; 0 = another reason
  std::size_t layouts = 0;
  std::string example;
};

struct SearchResult {
  /// The fastest first: of the modes of recomputation of a layout and ZeRO stage the fastest that fits.
  std::vector<Candidate> ranked;
  std::vector<Candidate> front;  ///< the Pareto front of time against memory, of all modes, fastest first
  /// The most frequent reason first; where nothing fits, too little memory before all others, and of it what
  /// misses least first.
  std::vector<Rejection> rejected;
  std::size_t examined = 0;  ///< modes of recomputation included
  std::size_t fitting = 0;   ///< with any of them: as many as are ranked before `keep` cuts them
};

/// What     Examines (tp, cp, pp, virtual stages, dp, ep, expert tp, ZeRO, micro-batch, recomputation,
///          dispatcher), the dense and the expert mesh folded independently: experts may be cut further than
///          the dense part.
/// Throws   ConfigError when no accelerator count or batch is given.
SearchResult search(const ModelSpec& model, const Workload& work, const Cluster& cluster, const Stack& stack,
                    const SearchOptions& options);

/// What     The ranking as a table: time, FLOP/s, memory, the part that makes a layout slower, the
///          impossible and why.
std::string format_search(const SearchResult& result, const ModelSpec& model, const Workload& work,
                          const Cluster& cluster, std::size_t rows);
/// The same for a program.
Json search_json(const SearchResult& result, const ModelSpec& model, const Workload& work, std::size_t rows);

}  // namespace collegium::plan
