// SPDX-License-Identifier: Apache-2.0
#include "collegium/train/metrics.h"

#include <cerrno>
#include <cstring>
#include <sstream>

#include "collegium/base/error.h"
#include "collegium/base/file.h"

namespace collegium::train {

namespace {

Json layers_json(const std::vector<moe::LayerMonitors>& layers) {
  Json list = Json::array();
  for (const moe::LayerMonitors& layer : layers) list.push_back(write_fields(layer));
  return list;
}

}  // namespace

// Whole records up to the step; a torn last line is left out.
std::string MetricsWriter::records_until(std::int64_t last_step) {
  std::string kept;
  std::istringstream lines(read_file(path_));
  std::string line;
  while (std::getline(lines, line)) {
    const Json record = Json::parse(line, nullptr, /*allow_exceptions=*/false);
    const bool whole = record.is_object() && record.contains("step") && record["step"].is_number_integer() &&
                       record.contains("kind") && record["kind"].is_string();
    if (!whole || record["step"].get<std::int64_t>() > last_step) break;
    if (record["kind"] == "validation") last_validation_ = record["step"].get<std::int64_t>();
    kept += line;
    kept += '\n';
  }
  return kept;
}

MetricsWriter::MetricsWriter(const std::filesystem::path& run_folder, std::int64_t last_step)
    : path_(run_folder / "metrics.jsonl") {
  if (path_exists(path_)) write_file_atomically(path_, records_until(last_step));
  file_.reset(std::fopen(path_.c_str(), "ab"));
  if (file_ == nullptr) throw Error(fmt::format("cannot write {}: {}", path_.string(), std::strerror(errno)));
}

void MetricsWriter::append(const Json& record) {
  const std::string line = record.dump() + "\n";
  if (std::fwrite(line.data(), 1, line.size(), file_.get()) != line.size() || std::fflush(file_.get()) != 0) {
    throw Error(fmt::format("cannot write {}: {}", path_.string(), std::strerror(errno)));
  }
}

void MetricsWriter::write(const StepReport& report, const StepSpeed& speed) {
  const CommReport& comm = report.communication;
  append({{"kind", "step"},
          {"step", report.step},
          {"loss", report.loss},
          {"balance_loss", report.balance_loss},
          {"normalized_balance", report.normalized_balance},
          {"balance_terms", report.balance_terms},
          {"learning_rate", report.learning_rate},
          {"gradient_norm", report.gradient.total},
          {"gradient_norm_by_kind", report.gradient.by_kind},
          {"clip_factor", report.clip_factor},
          {"target_tokens", report.num_targets},
          {"seconds", speed.seconds},
          {"tokens_per_s", speed.tokens_per_s},
          {"share_of_gemm_peak", speed.share_of_gemm_peak},
          {"communication",
           {{"rank", 0},
            {"bytes_within_nodes", comm.bytes_within_nodes},
            {"bytes_between_nodes", comm.bytes_between_nodes},
            {"all_to_all_s", comm.all_to_all_s},
            {"all_to_all_exposed_s", comm.all_to_all_exposed_s},
            {"hidden_share", comm.hidden_share}}},
          {"layers", layers_json(report.layers)}});
}

void MetricsWriter::write(std::int64_t step, const ValidationResult& validation,
                          const std::vector<std::string>& domains) {
  if (step == last_validation_) return;
  last_validation_ = step;
  Json specialization = Json::array();
  for (const LayerSpecialization& layer : validation.specialization)
    specialization.push_back(write_fields(layer));
  append({{"kind", "validation"},
          {"step", step},
          {"loss", validation.loss},
          {"target_tokens", validation.num_targets},
          {"domains", domains},
          {"domain_loss", validation.domain_loss},
          {"hf_pooled", validation.hf_pooled},
          {"layers", layers_json(validation.monitors)},
          {"specialization", specialization}});
}

void MetricsWriter::write(std::int64_t step, const std::vector<PredictedFigure>& comparison) {
  append({{"kind", "planner"}, {"step", step}, {"figures", comparison_json(comparison)}});
}

}  // namespace collegium::train
