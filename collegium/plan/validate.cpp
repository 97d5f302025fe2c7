// SPDX-License-Identifier: Apache-2.0
#include "collegium/plan/validate.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>

#include "collegium/base/error.h"
#include "collegium/base/rng.h"
#include "collegium/base/units.h"
#include "collegium/plan/account.h"

namespace collegium::plan {

namespace {

constexpr double kLargeStatic = 10.0 * kGiB;

double quantile(std::vector<double> values, double share) {
  if (values.empty()) return 0.0;
  std::sort(values.begin(), values.end());
  const double at = share * static_cast<double>(values.size() - 1);
  const auto low = static_cast<std::size_t>(at);
  const std::size_t high = std::min(low + 1, values.size() - 1);
  return values[low] + (at - std::floor(at)) * (values[high] - values[low]);
}

double mean_of(const std::vector<double>& values) {
  return std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
}

double model_flops(const PublishedRun& run) {
  return 3.0 * forward_flops_per_token(run.model, run.work.seq_len).total() * run.work.global_batch *
         run.work.seq_len;
}

// The usual utilisation: 6 N + 12 L D S per token, N what a token uses, scores not halved, over the peak.
double utilisation_flops(const PublishedRun& run) {
  const Account counts = account(run.model);
  const auto parameters = static_cast<double>(run.model.is_moe() ? counts.active : counts.total);
  const double scores = 12.0 * static_cast<double>(run.model.layers * run.model.hidden) * run.work.seq_len;
  return (6.0 * parameters + scores) * run.work.global_batch * run.work.seq_len;
}

// FLOPs of a step by the figure's own definition.
double step_flops(const PublishedRun& run) {
  if (run.metric == Metric::kHardwareFlops) return hardware_flops(run.model, run.layout, run.work);
  if (run.metric == Metric::kUtilisation) return utilisation_flops(run);
  return model_flops(run);
}

double flops_per_s(const PublishedRun& run) {
  if (run.metric != Metric::kUtilisation) return run.value;
  return run.value * peak_flops(run.cluster.accelerator, run.work.precision);
}

struct TimedRun {
  const PublishedRun* run;
  double seconds;
  bool half;  // which half of its pair's rows it belongs to
};

double predicted_step(const PublishedRun& run, double efficiency) {
  Cluster cluster = run.cluster;
  cluster.accelerator.gemm_efficiency = efficiency;
  return step_time(run.model, run.layout, run.work, cluster, run.stack).step_s;
}

// The efficiency at which the median of log(predicted/measured) is zero; the prediction falls as it rises.
double fit_efficiency(const std::vector<TimedRun>& rows, bool half) {
  double low = 0.05;
  double high = 1.0;
  double layouts = 0.0;
  for (int i = 0; i < 24; ++i) {
    const double middle = std::sqrt(low * high);
    // Releases that ran the same layout speak once: their mean.
    std::map<std::string, std::vector<double>> logs_of_layout;
    for (const TimedRun& row : rows) {
      if (row.half == half)
        logs_of_layout[row.run->layout_key].push_back(
            std::log(predicted_step(*row.run, middle) / row.seconds));
    }
    std::vector<double> logs;
    for (const auto& [key, of_layout] : logs_of_layout) logs.push_back(mean_of(of_layout));
    layouts = static_cast<double>(logs.size());
    (quantile(logs, 0.5) > 0.0 ? low : high) = middle;
  }
  // A handful of layouts is not trusted alone: the accelerator's own figure counts as one more.
  constexpr double kPriorLayouts = 1.0;
  const double prior = rows.front().run->cluster.accelerator.gemm_efficiency;
  return std::exp((layouts * std::log(std::sqrt(low * high)) + kPriorLayouts * std::log(prior)) /
                  (layouts + kPriorLayouts));
}

// Halves by a hash of the row's columns: equal rows stay together, and the split depends on nothing else.
bool half_of(const PublishedRun& run) { return (mix(hash_name(run.key), 0) & 1U) != 0; }

using Pairs = std::map<std::pair<std::string, std::string>, std::vector<TimedRun>>;

void judge_times(const Pairs& pairs, Validation& v) {
  for (const auto& [pair, rows] : pairs) {
    const auto in_b = static_cast<std::size_t>(
        std::count_if(rows.begin(), rows.end(), [](const TimedRun& r) { return r.half; }));
    const double fallback = rows.front().run->cluster.accelerator.gemm_efficiency;
    FittedConstant constant{pair.first, pair.second, fallback, fallback, rows.size()};
    // A constant needs both halves; the eight points of the Calculon paper are judged without any fit.
    const bool fitted = in_b >= 1 && rows.size() - in_b >= 1 && !rows.front().run->stack.never_fitted;
    if (fitted) {
      constant.efficiency_half_a = fit_efficiency(rows, false);
      constant.efficiency_half_b = fit_efficiency(rows, true);
      v.constants.push_back(constant);
    }
    for (const TimedRun& row : rows) {
      const double efficiency = row.half ? constant.efficiency_half_a : constant.efficiency_half_b;
      v.judged.push_back({row.run, "step time", row.seconds, predicted_step(*row.run, efficiency)});
    }
  }
}

void collect_times(Validation& v, Pairs& pairs) {
  std::map<std::string, double> seconds_of_key;
  for (const PublishedRun& run : v.runs) {
    if (run.metric == Metric::kStepTime) seconds_of_key.emplace(run.key, run.value);
  }
  for (const PublishedRun& run : v.runs) {
    const bool rate = run.metric == Metric::kModelFlops || run.metric == Metric::kHardwareFlops ||
                      run.metric == Metric::kUtilisation;
    if (run.metric != Metric::kStepTime && !rate) continue;
    double seconds = run.value;
    if (rate) {
      const auto partner = seconds_of_key.find(run.key);
      if (partner != seconds_of_key.end()) {
        v.judged.push_back(
            {&run, "identity", flops_per_s(run), step_flops(run) / (partner->second * run.layout.world())});
        continue;
      }
      seconds = step_flops(run) / (flops_per_s(run) * run.layout.world());
    }
    pairs[{run.stack.family, run.cluster.accelerator.name}].push_back({&run, seconds, half_of(run)});
  }
}

void judge_memory(Validation& v) {
  for (const PublishedRun& run : v.runs) {
    if (run.metric == Metric::kOutOfMemory) {
      const MemoryReport worst = worst_memory(run.model, run.layout, run.work, run.cluster, run.stack);
      v.verdicts.push_back({&run, false, fits(worst, run.cluster), run.contradiction});
      continue;
    }
    if (run.metric == Metric::kStepTime) {
      // A row that leaves recomputation open ran if any mode fits.
      Layout layout = run.layout;
      if (run.recompute_open) layout.recompute.full = true;
      const MemoryReport worst = worst_memory(run.model, layout, run.work, run.cluster, run.stack);
      if (!fits(worst, run.cluster) || !run.contradiction.empty())
        v.verdicts.push_back({&run, true, fits(worst, run.cluster), run.contradiction});
    }
    if (run.metric != Metric::kStaticMemory && run.metric != Metric::kPeakMemory) continue;
    const MemoryReport report =
        run.stage >= 0 ? stage_memory(run.model, run.layout, run.work, run.cluster, run.stack, run.stage)
                       : worst_memory(run.model, run.layout, run.work, run.cluster, run.stack);
    if (run.metric == Metric::kStaticMemory) {
      const char* name = run.value >= kLargeStatic ? "static memory" : "static memory < 10 GiB";
      v.judged.push_back({&run, name, run.value, report.static_bytes});
    } else {
      v.judged.push_back(
          {&run, "peak memory", run.value, run.device_memory ? report.device_bytes : report.peak_bytes});
    }
  }
}

// Whether two runs had the same layout on the same machines with the same software: what they need may differ
// by their models alone.
bool same_layout(const PublishedRun& a, const PublishedRun& b) {
  return layout_name(a.layout) == layout_name(b.layout) && a.stack.family == b.stack.family &&
         a.cluster.name == b.cluster.name && a.work.seq_len == b.work.seq_len &&
         matrix_format(a.work.precision) == matrix_format(b.work.precision);
}

// Marks verdicts that measurements contradict: a run that needed as much (within what peak memory is
// predicted to) under the same layout ended the other way.
void find_contradictions(Validation& v) {
  constexpr double kPeakError = 0.08;
  const auto needed = [](const PublishedRun& r) {
    return worst_memory(r.model, r.layout, r.work, r.cluster, r.stack).peak_bytes;
  };
  for (FitVerdict& verdict : v.verdicts) {
    if (verdict.ran == verdict.predicted_to_fit || !verdict.contradicted_by.empty()) continue;
    const double own = needed(*verdict.run);
    for (const PublishedRun& other : v.runs) {
      const bool ran = other.metric != Metric::kOutOfMemory;
      if (ran == verdict.ran || !same_layout(*verdict.run, other)) continue;
      const double their = needed(other);
      if (verdict.ran ? their > own * (1.0 + kPeakError) : their < own * (1.0 - kPeakError)) continue;
      verdict.contradicted_by =
          fmt::format("{} ({}) {} under the same layout, needing {:+.1f} %", other.name, other.place.text(),
                      ran ? "ran" : "ran out of memory", 100.0 * (their / own - 1.0));
      break;
    }
  }
}

// How far the measurements of `rows` lie from the median of all in `among` that share their key.
template <class Key>
std::vector<double> deviations(const std::vector<const Judged*>& rows,
                               const std::vector<const Judged*>& among, Key key) {
  std::map<std::string, std::vector<double>> twins;
  for (const Judged* row : among) twins[key(*row->run)].push_back(row->measured);
  std::vector<double> all;
  for (const Judged* row : rows) {
    const std::vector<double>& values = twins[key(*row->run)];
    if (values.size() > 1) all.push_back(std::abs(row->measured / quantile(values, 0.5) - 1.0));
  }
  return all;
}

void summarise(const std::vector<const Judged*>& rows, const std::vector<const Judged*>& among,
               const std::string& source, const std::string& metric, Validation& v) {
  ErrorRow e{.source = source, .metric = metric, .rows = rows.size()};
  std::vector<double> errors;
  for (const Judged* row : rows) {
    errors.push_back(std::abs(row->error()));
    e.mean += errors.back() / static_cast<double>(rows.size());
  }
  e.median = quantile(errors, 0.5);
  e.percentile90 = quantile(errors, 0.9);
  e.worst = quantile(errors, 1.0);
  const std::vector<double> equal = deviations(rows, rows, [](const PublishedRun& run) { return run.key; });
  e.repeated = equal.size();
  e.spread = quantile(equal, 0.5);
  const std::vector<double> releases =
      deviations(rows, among, [](const PublishedRun& run) { return run.layout_key; });
  e.over_releases = releases.size();
  e.release_spread = quantile(releases, 0.5);
  v.errors.push_back(e);
}

void summarise_all(Validation& v) {
  std::map<std::string, std::map<std::string, std::vector<const Judged*>>> by_metric;
  std::map<std::string, std::vector<const Judged*>> all;
  for (const Judged& row : v.judged) {
    by_metric[row.metric][row.run->stack.name].push_back(&row);
    all[row.metric].push_back(&row);
  }
  for (const auto& [metric, sources] : by_metric) {
    for (const auto& [source, rows] : sources) summarise(rows, all[metric], source, metric, v);
    summarise(all[metric], all[metric], "all sources", metric, v);
  }
}

struct Ranked {
  double predicted = 0.0;
  std::vector<double> measured;
};

constexpr std::size_t kSmallestSet = 6;
// Runs with equal columns differ by 6 % in the median: closer pairs have no order to predict. A set that
// repeats some of its layouts says itself how far equal runs lie apart.
constexpr double kIndistinct = 0.06;
constexpr std::size_t kEnoughRepeats = 3;

double indistinct(const std::map<std::string, Ranked>& set) {
  std::size_t repeats = 0;
  double widest = 0.0;
  for (const auto& [layout, entry] : set) {
    if (entry.measured.size() < 2) continue;
    repeats += entry.measured.size();
    const auto [low, high] = std::minmax_element(entry.measured.begin(), entry.measured.end());
    widest = std::max(widest, *high / *low - 1.0);
  }
  return repeats >= kEnoughRepeats ? widest : kIndistinct;
}

Ranking rank(const std::string& name, double closest, const std::vector<std::pair<double, double>>& points) {
  Ranking r;
  r.set = name;
  r.layouts = points.size();
  r.indistinct = closest;
  double compared = 0.0;
  for (std::size_t i = 0; i < points.size(); ++i) {
    for (std::size_t j = 0; j < i; ++j) {
      const double order = (points[i].first - points[j].first) * (points[i].second - points[j].second);
      const double sign = order > 0.0 ? 1.0 : (order < 0.0 ? -1.0 : 0.0);
      r.kendall_tau += sign;
      compared += 1.0;
      if (std::abs(std::log(points[i].second / points[j].second)) > closest) {
        r.kendall_tau_distinct += sign;
        ++r.distinct_pairs;
      }
    }
  }
  r.kendall_tau /= compared;
  if (r.distinct_pairs > 0) r.kendall_tau_distinct /= static_cast<double>(r.distinct_pairs);
  const auto chosen = std::min_element(points.begin(), points.end());
  const auto fastest = std::min_element(points.begin(), points.end(),
                                        [](const auto& a, const auto& b) { return a.second < b.second; });
  r.regret = chosen->second / fastest->second - 1.0;
  return r;
}

// Sets of layouts of one model, machine, batch and stack: does the prediction order them as measured?
void rank_layouts(Validation& v) {
  std::map<std::string, std::map<std::string, Ranked>> sets;
  for (const Judged& row : v.judged) {
    if (row.metric != "step time") continue;
    const PublishedRun& r = *row.run;
    const std::string set = fmt::format("{} on {} {} (batch {}, {})", r.name, r.layout.world(),
                                        r.cluster.accelerator.name, r.work.global_batch, r.work.precision);
    Ranked& entry = sets[set][layout_name(r.layout)];
    entry.predicted = row.predicted;
    entry.measured.push_back(row.measured);
  }
  for (const auto& [name, set] : sets) {
    if (set.size() < kSmallestSet) continue;
    std::vector<std::pair<double, double>> points;
    for (const auto& [layout, entry] : set)
      points.emplace_back(entry.predicted, quantile(entry.measured, 0.5));
    v.rankings.push_back(rank(name, indistinct(set), points));
  }
}

}  // namespace

double hardware_flops(const ModelSpec& m, const Layout& l, const Workload& w) {
  const TokenFlops f = forward_flops_per_token(m, w.seq_len);
  const double whole_scores = f.attention_scores * w.seq_len / mean_visible_keys(w.seq_len, 0);
  const double layers = f.attention_projections + f.dense_ffn + f.experts + f.router + whole_scores;
  const double passes = l.recompute.full ? 4.0 : 3.0;
  const double again = l.recompute.attention_core && !l.recompute.full ? whole_scores : 0.0;
  return (passes * layers + again + 3.0 * (f.head + f.mtp)) * w.global_batch * w.seq_len;
}

namespace {

Validation validate_rows(const std::vector<CsvRow>& rows) {
  Validation v;
  std::map<std::string, std::vector<CsvPlace>> refused;
  for (const CsvRow& row : rows) {
    try {
      v.runs.push_back(published_run(row));
    } catch (const ConfigError& error) {
      refused[error.what()].push_back(row.place);
    }
  }
  for (auto& [reason, places] : refused) v.refused.push_back({reason, std::move(places)});
  Pairs pairs;
  collect_times(v, pairs);
  judge_times(pairs, v);
  judge_memory(v);
  find_contradictions(v);
  summarise_all(v);
  rank_layouts(v);
  return v;
}

}  // namespace

Validation validate(const std::string& csv, const std::string& origin) {
  return validate_rows(read_csv(csv, origin));
}

Validation validate_path(const std::string& path) { return validate_rows(read_runs(path)); }

}  // namespace collegium::plan
