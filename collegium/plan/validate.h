// SPDX-License-Identifier: Apache-2.0
#pragma once

// Predictions against published runs: error tables per source and metric. One efficiency constant per (stack,
// accelerator) is fitted on a random half of that pair's step times and judged on the other half.

#include <string>
#include <vector>

#include "collegium/plan/published.h"
#include "collegium/plan/step_time.h"

namespace collegium::plan {

/// A prediction beside its measurement.
struct Judged {
  const PublishedRun* run = nullptr;
  std::string metric;  ///< "static memory", "static memory < 10 GiB", "peak memory", "identity", "step time"
  double measured = 0.0;
  double predicted = 0.0;
  double error() const { return predicted / measured - 1.0; }
};

/// What     Errors of one source and metric, as shares (0.05 = 5 %).
struct ErrorRow {
  std::string source;
  std::string metric;
  std::size_t rows = 0;
  double median = 0.0;
  double percentile90 = 0.0;
  double worst = 0.0;
  double mean = 0.0;
  double spread =
      0.0;  ///< median deviation among rows with equal columns: what no prediction can remove; 0 = none
  std::size_t repeated = 0;  ///< rows that have such a twin
  double release_spread =
      0.0;  ///< the same among rows whose columns are equal over releases of their software
  std::size_t over_releases = 0;  ///< rows that have such a twin
};

struct FittedConstant {
  std::string stack;
  std::string accelerator;
  double efficiency_half_a = 0.0;  ///< fitted on half A, used for half B
  double efficiency_half_b = 0.0;
  std::size_t rows = 0;
};

struct RefusedRows {
  std::string reason;
  std::vector<CsvPlace> places;
};

/// Whether runs that did or did not fit were predicted to.
struct FitVerdict {
  const PublishedRun* run = nullptr;
  bool ran = true;
  bool predicted_to_fit = true;
  std::string
      contradicted_by;  ///< another run of the same layout that says the opposite, or why the row cannot be
};

/// Layouts of one model on one machine with one batch, ordered by prediction and by measurement.
struct Ranking {
  std::string set;
  std::size_t layouts = 0;
  double kendall_tau = 0.0;           ///< agreement of the orders of all pairs, from -1 to 1
  double kendall_tau_distinct = 0.0;  ///< the same over pairs that lie further apart than equal runs do
  double indistinct = 0.0;  ///< how far: what repeats in the set differ by, or 6 % where it has too few
  std::size_t distinct_pairs = 0;
  double regret = 0.0;  ///< measured time of the layout predicted fastest, over the fastest, less 1
};

struct Validation {
  std::vector<PublishedRun> runs;
  std::vector<Judged> judged;
  std::vector<ErrorRow> errors;
  std::vector<FittedConstant> constants;
  std::vector<RefusedRows> refused;
  std::vector<FitVerdict> verdicts;  ///< only the wrong ones and all out-of-memory rows
  std::vector<Ranking> rankings;
};

/// What     Judges every row of a CSV text.
Validation validate(const std::string& csv, const std::string& origin);
/// What     The same of a file, or of every runs.csv below a folder.
/// Throws   ConfigError as read_runs().
Validation validate_path(const std::string& path);
/// What     The tables as text.
std::string format_validation(const Validation& validation, bool every_row);
/// The same for a program.
Json validation_json(const Validation& validation);

/// What     FLOPs of an optimizer step as hardware counts them: recomputation included, scores above the
///          diagonal too.
double hardware_flops(const ModelSpec& model, const Layout& layout, const Workload& work);

}  // namespace collegium::plan
