// SPDX-License-Identifier: Apache-2.0
// What a row measured, in which unit, on which accelerator and in which precision.
#include <algorithm>

#include "collegium/base/error.h"
#include "collegium/base/text.h"
#include "collegium/base/units.h"
#include "collegium/plan/published.h"

namespace collegium::plan {

namespace {

// The factor of a unit, or `otherwise` where the row names none.
double unit_of(const CsvRow& row, std::initializer_list<std::pair<const char*, double>> known,
               double otherwise) {
  const std::string unit = lower_case(row.text("unit"));
  if (unit.empty()) return otherwise;
  std::string names;
  for (const auto& [name, factor] : known) {
    if (unit == name) return factor;
    names.append(names.empty() ? "" : ", ").append(name);
  }
  throw ConfigError(
      fmt::format("unit = {}: a figure {} is read in {}", row.text("unit"), row.text("metric"), names));
}

double bytes_of(const CsvRow& row, double value) {
  return value *
         unit_of(row, {{"gib", kGiB}, {"gb", 1e9}, {"mib", kGiB / 1024.0}, {"mb", 1e6}, {"b", 1.0}}, kGiB);
}

// Shares are written as 0.45 or as 45 %.
double share_of(const CsvRow& row, double value) {
  if (value <= 1.0 && row.text("unit") != "%") return value;
  require_config(value <= 100.0, "value = {}: a share of more than 100 %", value);
  return value / 100.0;
}

void read_rate(const CsvRow& row, const std::string& metric, double value, PublishedRun& run) {
  const double flops = unit_of(row, {{"tflop/s", 1e12}, {"tflops", 1e12}, {"pflop/s", 1e15}}, 1e12);
  run.metric = metric == "model_tflops_per_gpu" ? Metric::kModelFlops : Metric::kHardwareFlops;
  run.value = value * flops;
}

}  // namespace

double required(const CsvRow& row, const std::string& column) {
  const auto value = row.number(column);
  require_config(value.has_value(), "{} is missing", column);
  require_config(*value > 0.0, "{} = {}: must be positive", column, *value);
  return *value;
}

void read_figure(const CsvRow& row, PublishedRun& run) {
  const std::string& metric = row.text("metric");
  const double value = required(row, "value");
  run.device_memory =
      metric == "peak_mem_nvidia_smi" || metric == "peak_mem" || metric == "peak_reserved_mem";
  if (metric == "static_alloc_mem") {
    run.metric = Metric::kStaticMemory;
    run.value = bytes_of(row, value);
  } else if (metric == "peak_alloc_mem" || run.device_memory) {
    run.metric = Metric::kPeakMemory;
    // nvidia-smi counts in GiB whatever the label says.
    const bool mislabelled = metric == "peak_mem_nvidia_smi" && row.text("unit") == "GB";
    run.value = mislabelled ? value * kGiB : bytes_of(row, value);
  } else if (metric == "oom") {
    run.metric = Metric::kOutOfMemory;
    run.value = value;
  } else if (metric == "iteration_time") {
    run.metric = Metric::kStepTime;
    run.value = value * unit_of(row, {{"s", 1.0}, {"ms", 1e-3}}, 1.0);
  } else if (metric == "tokens_per_s_per_gpu") {
    run.metric = Metric::kStepTime;
    run.value =
        required(row, "global_batch") * required(row, "seq_len") / (value * required(row, "num_gpus"));
  } else if (metric == "samples_per_s") {
    run.metric = Metric::kStepTime;
    run.value = required(row, "global_batch") / value;
  } else if (metric == "model_tflops_per_gpu" || metric == "hw_tflops_per_gpu") {
    read_rate(row, metric, value, run);
  } else if (metric == "mfu") {
    run.metric = Metric::kUtilisation;
    run.value = share_of(row, value);
  } else {
    throw ConfigError(
        fmt::format("metric = {}: not a figure of memory, time or FLOP/s that the planner predicts", metric));
  }
}

void read_precision(const CsvRow& row, PublishedRun& run) {
  const std::string& precision = row.text("precision");
  run.work.precision = precision.empty() ? "bf16" : precision;
  require_config(known_precision(run.work.precision),
                 "precision = {}: must name bf16, fp16, fp8, fp4, fp32 or tf32", precision);
}

std::string cluster_of(const std::string& gpu, const std::string& source) {
  require_config(!gpu.empty(), "gpu is missing");
  if (contains(source, "bigscience")) return "jean-zay-a100";
  if (contains(source, "vTrain")) return "a100-80-4rail";
  const std::string name = lower_case(gpu);
  const auto has = [&name](const char* part) { return contains(name, part); };
  if (has("v100") && !has("16gb")) return "v100-32";
  if (has("a100")) return has("40") ? "a100-40" : "a100-80";
  if (has("h100")) return has("96") ? "h100-96" : "h100-80";
  // Longer names first: "b200" ends "gb200".
  for (const char* known : {"h800", "h200", "gb300", "gb200", "b300", "b200", "mi300x"}) {
    if (has(known)) return known;
  }
  throw ConfigError(fmt::format("gpu = {}: not in the catalogue of clusters", gpu));
}

}  // namespace collegium::plan
