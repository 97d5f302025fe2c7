// SPDX-License-Identifier: Apache-2.0
#include "collegium/plan/cluster.h"

#include <algorithm>
#include <cmath>
#include <filesystem>

#include "collegium/base/error.h"
#include "collegium/base/file.h"
#include "collegium/base/text.h"
#include "collegium/base/toml.h"
#include "collegium/plan/embedded.h"

namespace collegium::plan {

namespace {

void require_positive(double value, const std::string& origin, const std::string& field) {
  require_config(std::isfinite(value) && value > 0.0, "{}: {} = {}: must be a positive number", origin, field,
                 value);
}

void require_share(double value, const std::string& origin, const std::string& field) {
  require_config(std::isfinite(value) && value > 0.0 && value <= 1.0, "{}: {} = {}: must lie in (0, 1]",
                 origin, field, value);
}

void validate_link(const Link& link, const std::string& origin, const std::string& field) {
  require_positive(link.gb_per_s, origin, fmt::format("{}.gb_per_s", field));
  require_share(link.efficiency, origin, fmt::format("{}.efficiency", field));
  require_config(std::isfinite(link.latency_us) && link.latency_us >= 0.0,
                 "{}: {}.latency_us = {}: must not be negative", origin, field, link.latency_us);
  require_config(std::isfinite(link.all_to_all_gb_per_s) && link.all_to_all_gb_per_s >= 0.0,
                 "{}: {}.all_to_all_gb_per_s = {}: must not be negative", origin, field,
                 link.all_to_all_gb_per_s);
  require_config(std::isfinite(link.all_to_all_latency_us) && link.all_to_all_latency_us >= 0.0,
                 "{}: {}.all_to_all_latency_us = {}: must not be negative", origin, field,
                 link.all_to_all_latency_us);
}

void validate(const Cluster& c, const std::string& origin) {
  require_config(!c.accelerator.peak_tflops.empty(), "{}: accelerator.peak_tflops is missing", origin);
  for (const auto& [format, tflops] : c.accelerator.peak_tflops)
    require_positive(tflops, origin, fmt::format("accelerator.peak_tflops.{}", format));
  for (const auto& [format, falloff] : c.accelerator.gemm_falloff) {
    for (const auto& [field, value] : {std::pair{"rows", falloff.rows}, std::pair{"columns", falloff.columns},
                                       std::pair{"depth", falloff.depth}})
      require_config(std::isfinite(value) && value >= 0.0,
                     "{}: accelerator.gemm_falloff.{}.{} = {}: must not be negative", origin, format, field,
                     value);
  }
  require_share(c.accelerator.attention_forward, origin, "accelerator.attention_forward");
  require_share(c.accelerator.attention_backward, origin, "accelerator.attention_backward");
  require_config(std::isfinite(c.accelerator.launch_us) && c.accelerator.launch_us >= 0.0,
                 "{}: accelerator.launch_us = {}: must not be negative", origin, c.accelerator.launch_us);
  require_config(std::isfinite(c.accelerator.workspace_gib) && c.accelerator.workspace_gib >= 0.0,
                 "{}: accelerator.workspace_gib = {}: must not be negative", origin,
                 c.accelerator.workspace_gib);
  require_config(
      std::isfinite(c.accelerator.grouped_workspace_gib) && c.accelerator.grouped_workspace_gib >= 0.0,
      "{}: accelerator.grouped_workspace_gib = {}: must not be negative", origin,
      c.accelerator.grouped_workspace_gib);
  require_positive(c.accelerator.memory_gib, origin, "accelerator.memory_gib");
  require_positive(c.accelerator.memory_gb_per_s, origin, "accelerator.memory_gb_per_s");
  require_share(c.accelerator.gemm_efficiency, origin, "accelerator.gemm_efficiency");
  require_share(c.accelerator.memory_efficiency, origin, "accelerator.memory_efficiency");
  require_config(std::isfinite(c.accelerator.attention_length) && c.accelerator.attention_length >= 0.0,
                 "{}: accelerator.attention_length = {}: must not be negative (0 = unknown)", origin,
                 c.accelerator.attention_length);
  require_config(c.accelerator.optimizer_efficiency >= 0.0 && c.accelerator.optimizer_efficiency <= 1.0,
                 "{}: accelerator.optimizer_efficiency = {}: must lie in [0, 1] (0 = memory_efficiency)",
                 origin, c.accelerator.optimizer_efficiency);
  require_config(c.accelerator.step_efficiency >= 0.0 && c.accelerator.step_efficiency <= 2.0,
                 "{}: accelerator.step_efficiency = {}: must lie in [0, 2] (0 = unknown)", origin,
                 c.accelerator.step_efficiency);
  require_config(c.accelerator.compute_units >= 1, "{}: accelerator.compute_units = {}: must be at least 1",
                 origin, c.accelerator.compute_units);
  require_config(c.node_size >= 1, "{}: node_size = {}: must be at least 1", origin, c.node_size);
  require_config(c.cores_per_rank >= 0, "{}: cores_per_rank = {}: must not be negative", origin,
                 c.cores_per_rank);
  require_config(c.fast_domain >= 1, "{}: fast_domain = {}: must be at least 1", origin, c.fast_domain);
  validate_link(c.fast_link, origin, "fast_link");
  validate_link(c.slow_link, origin, "slow_link");
}

}  // namespace

Cluster parse_cluster(std::string_view text, const std::string& origin) {
  Cluster cluster;
  read_fields(parse_toml(text, origin), origin, cluster);
  validate(cluster, origin);
  return cluster;
}

std::vector<std::string> cluster_names() {
  std::vector<std::string> names;
  for (const EmbeddedFile& file : embedded_clusters()) names.emplace_back(file.name);
  std::sort(names.begin(), names.end());
  return names;
}

Cluster load_cluster(const std::string& name_or_path, std::string_view field) {
  for (const EmbeddedFile& file : embedded_clusters()) {
    if (file.name == name_or_path) return parse_cluster(file.text, fmt::format("cluster {}", name_or_path));
  }
  if (!path_exists(name_or_path)) {
    const std::vector<std::string> names = cluster_names();
    const auto nearest = nearest_name(name_or_path, names);
    throw ConfigError(fmt::format("{} {}: neither a cluster of the catalogue nor a file{}; known: {}", field,
                                  name_or_path, nearest ? fmt::format(" (did you mean {}?)", *nearest) : "",
                                  fmt::join(names, ", ")));
  }
  return parse_cluster(read_file(name_or_path), name_or_path);
}

bool known_precision(const std::string& precision) {
  const std::string small = lower_case(precision);
  for (const char* part :
       {"bf16", "fp16", "bfloat16", "float16", "fp8", "float8", "fp4", "fp32", "tf32", "float32"}) {
    if (contains(small, part)) return true;
  }
  return small == "mixed";
}

std::string matrix_format(const std::string& precision) {
  const std::string p = lower_case(precision);
  if (contains(p, "fp4")) return "fp4";
  if (contains(p, "fp8") || contains(p, "float8")) return "fp8";
  if (p == "fp32" || p == "float32" || p == "tf32") return "fp32";
  return "bf16";
}

double peak_flops(const Accelerator& accelerator, const std::string& precision) {
  require_config(known_precision(precision),
                 "precision = {}: must name bf16, fp16, fp8, mxfp8, nvfp4, fp32 or tf32", precision);
  const std::string format = matrix_format(precision);
  const auto found = accelerator.peak_tflops.find(format);
  if (found == accelerator.peak_tflops.end())
    throw ConfigError(
        fmt::format("precision {}: {} has no peak_tflops.{}", precision, accelerator.name, format));
  return found->second * 1e12;
}

namespace {

// Scalars before tables, as TOML wants them; numbers with as many digits as bring back the same value.
void append_table(const Json& table, const std::string& name, std::string& text) {
  for (const auto& [key, value] : table.items()) {
    if (value.is_number_float()) {
      text += fmt::format("{} = {}\n", key, value.get<double>());
    } else if (!value.is_object()) {
      text += fmt::format("{} = {}\n", key, value.dump());
    }
  }
  for (const auto& [key, value] : table.items()) {
    if (!value.is_object()) continue;
    const std::string path = name.empty() ? key : name + "." + key;
    text += fmt::format("\n[{}]\n", path);
    append_table(value, path, text);
  }
}

}  // namespace

std::string cluster_toml(const Cluster& cluster) {
  Cluster copy = cluster;
  std::string text;
  append_table(internal::write_value(copy), "", text);
  return text;
}

}  // namespace collegium::plan
