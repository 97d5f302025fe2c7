// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>

#include "collegium/base/error.h"
#include "collegium/base/text.h"
#include "collegium/base/units.h"
#include "collegium/plan/validate.h"

namespace collegium::plan {

namespace {

std::string percent(double share) { return fmt::format("{:.1f} %", 100.0 * share); }

std::string format_every_row(const Validation& v) {
  std::string text = "\nEvery row (sorted by error)\n";
  std::vector<const Judged*> rows;
  for (const Judged& row : v.judged) rows.push_back(&row);
  std::sort(rows.begin(), rows.end(), [](const Judged* a, const Judged* b) {
    return std::make_tuple(a->metric, a->run->stack.name, a->error()) <
           std::make_tuple(b->metric, b->run->stack.name, b->error());
  });
  for (const Judged* row : rows) {
    const bool memory = contains(row->metric, "memory");
    const double scale = memory ? 1.0 / kGiB : (row->metric == "identity" ? 1e-12 : 1.0);
    const char* unit = memory ? "GiB" : (row->metric == "identity" ? "TFLOP/s" : "s");
    text += fmt::format("  {:+7.1f} %  measured {:9.3f} {}, predicted {:9.3f} {}  {} | {} | {} | {} | {}\n",
                        100.0 * row->error(), row->measured * scale, unit, row->predicted * scale, unit,
                        row->metric, row->run->name, row->run->cluster.name, layout_name(row->run->layout),
                        row->run->place.text());
  }
  return text;
}

std::string format_verdicts(const Validation& v) {
  std::size_t oom = 0;
  std::size_t oom_right = 0;
  std::string wrong;
  std::string contradicted;
  for (const FitVerdict& verdict : v.verdicts) {
    if (!verdict.ran) {
      ++oom;
      if (!verdict.predicted_to_fit) ++oom_right;
    }
    if (verdict.ran == verdict.predicted_to_fit && verdict.contradicted_by.empty()) continue;
    std::string& list = verdict.contradicted_by.empty() ? wrong : contradicted;
    list += fmt::format("  {}: {} {} on {} {}, predicted {}\n", verdict.run->place.text(), verdict.run->name,
                        layout_name(verdict.run->layout), verdict.run->cluster.name,
                        verdict.ran ? "ran" : "ran out of memory",
                        verdict.predicted_to_fit ? "to fit" : "not to fit");
    if (!verdict.contradicted_by.empty())
      list += fmt::format("    contradicted: {}\n", verdict.contradicted_by);
  }
  return fmt::format(
      "\nOut of memory: {} of {} such runs are predicted not to fit; wrong verdicts:\n{}Contradicted by "
      "another run or "
      "by their own columns:\n{}",
      oom_right, oom, wrong.empty() ? "  none\n" : wrong, contradicted.empty() ? "  none\n" : contradicted);
}

}  // namespace

std::string format_validation(const Validation& v, bool every_row) {
  std::string text =
      fmt::format("{:<24}{:<62}{:>5}{:>10}{:>10}{:>10}{:>10}{:>14}{:>14}\n", "metric", "source", "rows",
                  "median", "90th pct", "worst", "mean", "equal rows", "releases");
  for (const ErrorRow& e : v.errors) {
    const auto twins = [](double spread, std::size_t rows) {
      return rows > 0 ? fmt::format("{} ({})", percent(spread), rows) : std::string("-");
    };
    text += fmt::format("{:<24}{:<62}{:>5}{:>10}{:>10}{:>10}{:>10}{:>14}{:>14}\n", e.metric,
                        e.source.substr(0, 61), e.rows, percent(e.median), percent(e.percentile90),
                        percent(e.worst), percent(e.mean), twins(e.spread, e.repeated),
                        twins(e.release_spread, e.over_releases));
  }
  text +=
      "(equal rows: median deviation of measurements whose columns are all equal, and their number: no "
      "prediction can "
      "be closer;\n releases: the same over releases of one software, which share a constant)\n";
  text +=
      "\nEfficiency of large matrix products, fitted on one half of the rows and judged on the other, each "
      "way\n";
  for (const FittedConstant& c : v.constants)
    text += fmt::format("  {:<62}{:<16} {:.3f} and {:.3f} of the peak ({} rows)\n", c.stack.substr(0, 61),
                        c.accelerator, c.efficiency_half_a, c.efficiency_half_b, c.rows);
  text += format_verdicts(v);
  text +=
      "\nRanking of layouts: Kendall tau over all pairs, and over pairs measured further apart than equal "
      "runs are\n";
  for (const Ranking& r : v.rankings)
    text += fmt::format(
        "  {:<70}{:>3} layouts, tau {:.2f}, {:.2f} over the {} pairs more than {} apart; the one predicted "
        "fastest is {} "
        "slower than the fastest\n",
        r.set, r.layouts, r.kendall_tau, r.kendall_tau_distinct, r.distinct_pairs, percent(r.indistinct),
        percent(r.regret));
  std::size_t refused = 0;
  for (const RefusedRows& r : v.refused) refused += r.places.size();
  text += fmt::format("\nRefused rows: {}\n", refused);
  for (const RefusedRows& r : v.refused)
    text += fmt::format("  {:>4} rows ({}{}): {}\n", r.places.size(), r.places.front().text(),
                        r.places.size() > 1 ? ", ..." : "", r.reason);
  if (every_row) text += format_every_row(v);
  return text;
}

Json validation_json(const Validation& v) {
  Json errors = Json::array();
  for (const ErrorRow& e : v.errors)
    errors.push_back({{"metric", e.metric},
                      {"source", e.source},
                      {"rows", e.rows},
                      {"median_error", e.median},
                      {"percentile_90_error", e.percentile90},
                      {"worst_error", e.worst},
                      {"mean_error", e.mean},
                      {"equal_rows_deviation", e.spread},
                      {"equal_rows", e.repeated},
                      {"over_releases_deviation", e.release_spread},
                      {"over_releases", e.over_releases}});
  Json constants = Json::array();
  for (const FittedConstant& c : v.constants)
    constants.push_back({{"stack", c.stack},
                         {"accelerator", c.accelerator},
                         {"half_a", c.efficiency_half_a},
                         {"half_b", c.efficiency_half_b},
                         {"rows", c.rows}});
  Json rows = Json::array();
  for (const Judged& j : v.judged)
    rows.push_back({{"file", j.run->place.file},
                    {"line", j.run->place.line},
                    {"name", j.run->name},
                    {"metric", j.metric},
                    {"layout", layout_name(j.run->layout)},
                    {"measured", j.measured},
                    {"predicted", j.predicted},
                    {"assumptions", j.run->assumptions}});
  Json refused = Json::array();
  for (const RefusedRows& r : v.refused) {
    Json places = Json::array();
    for (const CsvPlace& place : r.places) places.push_back({{"file", place.file}, {"line", place.line}});
    refused.push_back({{"reason", r.reason}, {"rows", places}});
  }
  Json verdicts = Json::array();
  for (const FitVerdict& f : v.verdicts)
    verdicts.push_back({{"file", f.run->place.file},
                        {"line", f.run->place.line},
                        {"ran", f.ran},
                        {"predicted_to_fit", f.predicted_to_fit},
                        {"name", f.run->name},
                        {"contradicted_by", f.contradicted_by}});
  Json rankings = Json::array();
  for (const Ranking& r : v.rankings)
    rankings.push_back({{"set", r.set},
                        {"layouts", r.layouts},
                        {"kendall_tau", r.kendall_tau},
                        {"kendall_tau_distinct", r.kendall_tau_distinct},
                        {"indistinct", r.indistinct},
                        {"regret", r.regret}});
  return {{"errors", errors},   {"constants", constants}, {"rows", rows},
          {"refused", refused}, {"verdicts", verdicts},   {"rankings", rankings}};
}

}  // namespace collegium::plan
