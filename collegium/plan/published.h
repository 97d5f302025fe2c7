// SPDX-License-Identifier: Apache-2.0
#pragma once

// Published runs: rows of a CSV file, one measured figure each, as something the planner can predict. What a
// row leaves open is filled by rules that are listed with the row.

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "collegium/plan/cluster.h"
#include "collegium/plan/layout.h"
#include "collegium/plan/model_spec.h"

namespace collegium::plan {

/// A line of a file; no file where there is one only.
struct CsvPlace {
  std::string file;
  int line = 0;
  std::string text() const;  ///< "lab/runs.csv line 3", "line 3"
};

/// One row: column -> text, and its place.
struct CsvRow {
  CsvPlace place;
  std::map<std::string, std::string> fields;
  std::string defect;  ///< why the row is no row of this table: another number of fields than the header
  /// The field's text; empty when the column is absent.
  const std::string& text(const std::string& column) const;
  /// The field as a number, or nothing when it is empty.
  std::optional<double> number(const std::string& column) const;
};

/// What     Reads a CSV text with a header line; quoted fields may hold commas and quotes. A row with another
///          number of fields than the header is kept with its defect.
/// Throws   ConfigError: no header, or a column named twice.
std::vector<CsvRow> read_csv(const std::string& text, const std::string& origin);

/// What     The rows of a CSV file, or of every runs.csv below a folder: these in the order of their paths
///          below it, which their places name.
/// Throws   ConfigError: unreadable, no such file below the folder, columns that differ, no rows at all.
std::vector<CsvRow> read_runs(const std::string& path);

/// What a figure measures.
enum class Metric {
  kStaticMemory,
  kPeakMemory,
  kOutOfMemory,
  kStepTime,       ///< seconds, or tokens per second and accelerator
  kModelFlops,     ///< model FLOP/s per accelerator
  kHardwareFlops,  ///< FLOP/s with recomputation counted, causal attention not halved
  kUtilisation     ///< model FLOP/s over the peak
};

/// A row the planner can predict.
struct PublishedRun {
  CsvPlace place;
  std::string name;
  std::string source;  ///< repository and document
  Metric metric = Metric::kStepTime;
  double value = 0.0;  ///< in seconds, bytes, FLOP/s, or 1
  std::string key;     ///< equal for rows of one run with equal columns
  std::string
      layout_key;  ///< equal for rows whose columns are equal but for name and release of the software
  ModelSpec model;
  Layout layout;
  Workload work;
  Stack stack;
  Cluster cluster;
  int stage = -1;               ///< the stage whose memory was measured; -1 = the worst
  bool recompute_open = false;  ///< the row does not say what is recomputed
  bool device_memory = false;   ///< the device's own figure, context and fragmentation included
  std::string contradiction;    ///< why the row cannot be as it says, if so
  std::vector<std::string> assumptions;
};

/// What     A row as a run.
/// Throws   ConfigError with the reason why the row cannot be predicted: unknown metric, accelerator or
///          architecture, missing or contradictory columns.
PublishedRun published_run(const CsvRow& row);

/// What     A column's positive number.
/// Throws   ConfigError: missing, no number, or not positive.
double required(const CsvRow& row, const std::string& column);
/// What     Reads metric, value and unit; the precision; the cluster of the catalogue that an accelerator's
///          name means.
/// Throws   ConfigError with the reason why the row cannot be predicted.
void read_figure(const CsvRow& row, PublishedRun& run);
void read_precision(const CsvRow& row, PublishedRun& run);
std::string cluster_of(const std::string& gpu, const std::string& source);

/// What     The habits of the software a source was measured with, by its name.
Stack stack_of(const std::string& source, const std::string& precision);
/// What     The repository, and the document or container, without the row's own details.
std::string source_name(const std::string& source);

}  // namespace collegium::plan
