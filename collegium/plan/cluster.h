// SPDX-License-Identifier: Apache-2.0
#pragma once

// What the planner knows about machines: an accelerator, the fast links inside a domain, the slow links
// between domains. Read from the TOML files of configs/clusters (compiled in) or from a file of the user's.

#include <map>
#include <string>
#include <vector>

#include "collegium/base/fields.h"

namespace collegium::plan {

/// How products of a number format slow down as they shrink, where that was measured: the rate is the peak
/// times m/(m + rows) * n/(n + columns) * k/(k + depth).
struct GemmFalloff {
  double rows = 0.0;
  double columns = 0.0;
  double depth = 0.0;
  bool operator==(const GemmFalloff&) const = default;
};

struct Accelerator {
  std::string name;
  std::map<std::string, double> peak_tflops;  ///< dense matrix peak per number format: bf16, fp8, fp4, fp32
  double memory_gib = 0.0;
  double memory_gb_per_s = 0.0;
  int compute_units = 1;         ///< blocks that run at once; what a GEMM's tiles are dealt out to
  double gemm_efficiency = 0.7;  ///< share of the peak that a large GEMM reaches: the one fitted constant
  std::map<std::string, GemmFalloff>
      gemm_falloff;                 ///< per format; without one, tiles are dealt to compute_units
  double attention_forward = 0.4;   ///< share of the 16-bit peak that fused attention reaches, forward
  double attention_backward = 0.3;  ///< and backward
  double attention_length = 0.0;    ///< of the sequences that our own attention was measured on; 0 = unknown
  double memory_efficiency = 0.85;  ///< share of the bandwidth that streaming kernels reach
  double optimizer_efficiency = 0.0;  ///< the same of the optimizer's pass, where measured; 0 = as the others
  /// Share of the planned rate that the computation of a whole step of ours reaches, where measured; 0 =
  /// unknown.
  double step_efficiency = 0.0;
  double launch_us = 3.0;              ///< what each kernel adds
  double workspace_gib = 0.3;          ///< held by libraries before the first activation
  double grouped_workspace_gib = 0.0;  ///< the same for products grouped over experts, which use more streams
  bool operator==(const Accelerator&) const = default;
};

/// One direction of one accelerator's share of a link.
struct Link {
  double gb_per_s = 0.0;
  double latency_us = 5.0;
  double efficiency = 0.8;  ///< share of the line rate that large collectives reach
  /// All-to-all, where it was measured apart (0 = as the others): GB/s that a rank sends, microseconds of a
  /// call.
  double all_to_all_gb_per_s = 0.0;
  double all_to_all_latency_us = 0.0;
  bool operator==(const Link&) const = default;
};

struct Cluster {
  std::string name;
  std::string note;
  int node_size = 8;  ///< accelerators of a machine; of a CPU, its ranks
  int cores_per_rank =
      0;                ///< of a CPU: cores that a rank computes with, all figures being a rank's; 0 = a GPU
  int fast_domain = 8;  ///< accelerators that the fast link joins (72 in an NVL72 rack)
  Accelerator accelerator;
  Link fast_link;
  Link slow_link;
  bool operator==(const Cluster&) const = default;
};

template <class Fields>
void describe(Fields& fields, GemmFalloff& f) {
  fields("rows", f.rows, "rows at which a product reaches half of what many rows reach");
  fields("columns", f.columns, "the same of its columns");
  fields("depth", f.depth, "the same of its inner dimension");
}
template <class Fields>
void describe(Fields& fields, Accelerator& a) {
  fields("name", a.name, "what it is called");
  fields("peak_tflops", a.peak_tflops, "TFLOP/s of dense matrix products per format: bf16, fp8, fp4, fp32");
  fields("memory_gib", a.memory_gib, "GiB that a process can allocate");
  fields("memory_gb_per_s", a.memory_gb_per_s, "GB/s of its memory");
  fields("compute_units", a.compute_units, "units that the tiles of a GEMM are dealt out to");
  fields("gemm_efficiency", a.gemm_efficiency, "share of the peak that a large GEMM reaches");
  fields("gemm_falloff", a.gemm_falloff, "per format, where measured: how small products fall off the peak");
  fields("attention_forward", a.attention_forward, "share of the 16-bit peak that fused attention reaches");
  fields("attention_backward", a.attention_backward, "the same of its backward pass");
  fields("attention_length", a.attention_length,
         "positions of the sequences it was measured on; 0 = unknown");
  fields("memory_efficiency", a.memory_efficiency, "share of memory_gb_per_s that streaming kernels reach");
  fields("optimizer_efficiency", a.optimizer_efficiency, "the same of the optimizer; 0 = memory_efficiency");
  fields(
      "step_efficiency", a.step_efficiency,
      "share of the planned rate that the computation of a step of `collegium train` reaches, for what train "
      "predicts of itself; 0 = unknown");
  fields("launch_us", a.launch_us, "microseconds that each kernel adds");
  fields("workspace_gib", a.workspace_gib, "GiB that libraries hold");
  fields("grouped_workspace_gib", a.grouped_workspace_gib, "GiB more that grouped products of experts hold");
}
template <class Fields>
void describe(Fields& fields, Link& l) {
  fields("gb_per_s", l.gb_per_s, "GB/s of one accelerator in one direction");
  fields("latency_us", l.latency_us, "microseconds of a message");
  fields("efficiency", l.efficiency, "share of gb_per_s that large collectives reach");
  fields("all_to_all_gb_per_s", l.all_to_all_gb_per_s,
         "GB/s that a rank sends in an all-to-all; 0 = gb_per_s");
  fields("all_to_all_latency_us", l.all_to_all_latency_us,
         "microseconds of an all-to-all; 0 = from latency_us");
}
template <class Fields>
void describe(Fields& fields, Cluster& c) {
  fields("name", c.name, "what it is called");
  fields("note", c.note, "where the figures come from");
  fields("node_size", c.node_size, "accelerators of a machine; of a CPU, its ranks");
  fields("cores_per_rank", c.cores_per_rank,
         "of a CPU: cores of a rank, all figures being a rank's; 0 = a GPU");
  fields("fast_domain", c.fast_domain, "accelerators that the fast link joins");
  fields("accelerator", c.accelerator, "the accelerator");
  fields("fast_link", c.fast_link, "inside a domain");
  fields("slow_link", c.slow_link, "between domains");
}

/// What     A cluster by its name in the catalogue or from a TOML file; `field` is what named it.
/// Throws   ConfigError: unknown name (with the nearest), unknown key, or a figure that is not a positive
///          number.
Cluster load_cluster(const std::string& name_or_path, std::string_view field = "--cluster");
/// The same from TOML text at hand; `origin` names it in messages.
Cluster parse_cluster(std::string_view text, const std::string& origin);
/// What     Names of the catalogue, sorted.
std::vector<std::string> cluster_names();

/// What     FLOP/s of matrix products in a training precision ("bf16", "fp16", "fp8", "mxfp8", "nvfp4",
///          "fp32", ...).
/// Throws   ConfigError when the accelerator has no such format.
double peak_flops(const Accelerator& accelerator, const std::string& precision);
/// What     Whether a training precision names a number format that the planner knows.
bool known_precision(const std::string& precision);
/// What     The format of the matrix products of a training precision: "fp16" and "amp_bf16" -> "bf16", ...
std::string matrix_format(const std::string& precision);

/// What     The description as TOML; parse_cluster() reads back an equal one.
std::string cluster_toml(const Cluster& cluster);

}  // namespace collegium::plan
