// SPDX-License-Identifier: Apache-2.0
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <array>
#include <cstring>
#include <functional>

#include "collegium/base/error.h"
#include "collegium/base/machine.h"
#include "collegium/base/units.h"
#include "collegium/cli/bench.h"
#include "collegium/cli/launch.h"
#include "collegium/cli/progress.h"
#include "collegium/comm/seats.h"

namespace collegium::cli {

namespace {

constexpr std::int64_t kSmallest = 4096;  // bytes of a buffer
constexpr double kMib = 1048576.0;

struct CommBenchOptions {
  double max_mib = 64.0;
  double seconds = 0.1;
  LaunchOptions launch;
  bool json = false;
};

/// One verb on buffers of one size: `run` calls and waits, `received` is what a rank gets from the others.
struct CommCase {
  std::string verb;
  double received = 0.0;
  std::function<void()> run;
};

struct CommRow {
  std::string verb;
  std::int64_t bytes = 0;
  double memcpy_bytes_per_s = 0.0;
  std::int64_t runs = 0;
  Spread seconds;
  double bytes_per_s = 0.0;

  CommRow(std::string name, std::int64_t buffer, double memcpy)
      : verb(std::move(name)), bytes(buffer), memcpy_bytes_per_s(memcpy) {}
};

// The whole buffer is `bytes`: what a rank contributes, or for all_gather what it ends up with.
std::vector<CommCase> cases_of(comm::Communicator& world, std::int64_t bytes) {
  const std::int64_t size = world.size();
  const std::int64_t count = std::max<std::int64_t>(1, bytes / (4 * size)) * size;
  const at::Tensor whole = at::zeros({count}, at::kFloat);
  const at::Tensor other = at::zeros({count}, at::kFloat);
  const at::Tensor part = at::zeros({count / size}, at::kFloat);
  const auto all = static_cast<double>(count * 4);
  const double others_parts = all * static_cast<double>(size - 1) / static_cast<double>(size);
  return {{"all_reduce", 2.0 * others_parts, [=, &world] { world.all_reduce(whole).wait(); }},
          {"all_gather", others_parts, [=, &world] { world.all_gather(part, whole).wait(); }},
          {"reduce_scatter", others_parts, [=, &world] { world.reduce_scatter(whole, part).wait(); }},
          {"all_to_all", others_parts, [=, &world] { world.all_to_all(whole, other).wait(); }},
          {"broadcast", all, [=, &world] { world.broadcast(whole, 0).wait(); }}};
}

std::vector<CommRow> measure(const CommBenchOptions& options, comm::Communicator& world) {
  require_config(world.size() > 1, "bench comm: {} rank has nobody to talk to; pass --ranks 2 or more",
                 world.size());
  constexpr std::int64_t kFactor = 4;
  Progress progress;
  std::vector<CommRow> rows;
  const auto show = [&](const std::string& what) {
    if (world.rank() == 0) progress.show(what);
  };
  show("barrier");
  CommRow barrier("barrier", 0, 0.0);
  barrier.seconds = time_runs(world, options.seconds, barrier.runs, [&] { world.barrier(); });
  rows.push_back(barrier);
  for (std::int64_t bytes = kSmallest; static_cast<double>(bytes) <= options.max_mib * kMib;
       bytes *= kFactor) {
    // Tensors, which begin at cache lines as those of the verbs do: copies between memory that begins
    // elsewhere took 20 times as long on a core whose string instructions do not bear it.
    const at::Tensor from = at::ones({bytes}, at::kByte);
    const at::Tensor to = at::zeros({bytes}, at::kByte);
    CommRow copy("memcpy", bytes, 0.0);
    copy.seconds = time_runs(world, options.seconds, copy.runs, [&] {
      std::memcpy(to.mutable_data_ptr(), from.const_data_ptr(), from.nbytes());
    });
    copy.memcpy_bytes_per_s = static_cast<double>(bytes) / copy.seconds.median;
    copy.bytes_per_s = copy.memcpy_bytes_per_s;
    rows.push_back(copy);
    for (const CommCase& c : cases_of(world, bytes)) {
      show(fmt::format("{} of {}", c.verb, format_bytes(static_cast<double>(bytes))));
      CommRow row(c.verb, bytes, copy.memcpy_bytes_per_s);
      row.seconds = time_runs(world, options.seconds, row.runs, c.run);
      row.bytes_per_s = c.received / row.seconds.median;
      rows.push_back(row);
    }
  }
  progress.finish();
  return rows;
}

Json rows_json(const std::vector<CommRow>& rows) {
  Json list = Json::array();
  for (const CommRow& row : rows) {
    Json json = {{"verb", row.verb},
                 {"bytes", row.bytes},
                 {"runs", row.runs},
                 {"seconds_min", row.seconds.min},
                 {"seconds_median", row.seconds.median}};
    if (row.bytes > 0) {
      json["bytes_per_s"] = row.bytes_per_s;
      json["memcpy_bytes_per_s"] = row.memcpy_bytes_per_s;
      json["fraction_of_memcpy"] = row.bytes_per_s / row.memcpy_bytes_per_s;
    }
    list.push_back(json);
  }
  return list;
}

void print_rows(const std::vector<CommRow>& rows, int ranks) {
  fmt::print(
      "{} ranks; bandwidth is what one rank receives from the others; memcpy runs on all ranks at once\n",
      ranks);
  fmt::print("{:<15} {:>11} {:>10} {:>10} {:>12} {:>10}\n", "verb", "buffer", "least", "median", "bandwidth",
             "of memcpy");
  for (const CommRow& row : rows) {
    fmt::print("{:<15} {:>11} {:>10} {:>10}", row.verb,
               row.bytes > 0 ? format_bytes(static_cast<double>(row.bytes)) : "",
               format_seconds(row.seconds.min), format_seconds(row.seconds.median));
    if (row.bytes > 0) {
      fmt::print(" {:>7.2f} GB/s {:>10}", row.bytes_per_s / kGiga,
                 format_percent(row.bytes_per_s / row.memcpy_bytes_per_s));
    }
    fmt::print("\n");
  }
}

void require_memory(const CommBenchOptions& options, comm::Communicator& world) {
  constexpr double kBuffers = 5.0;
  const auto ranks = static_cast<double>(comm::Seats(world).neighbours().size());
  const double most_mib = machine_memory_bytes() / kMib / kBuffers / ranks;
  require_config(
      options.max_mib <= most_mib,
      "--max-mib {}: must be at most {:.0f}: {} ranks of this machine hold {} buffers each, and it "
      "has {}",
      options.max_mib, most_mib, ranks, kBuffers, format_bytes(machine_memory_bytes()));
}

void run(const CommBenchOptions& options) {
  constexpr double kLeastMib = static_cast<double>(kSmallest) / kMib;
  require_config(options.max_mib >= kLeastMib, "--max-mib {}: must be at least {}, the smallest buffer",
                 options.max_mib, kLeastMib);
  require_config(options.seconds > 0.0, "--seconds {}: must be positive", options.seconds);
  launch(options.launch, [&](const std::shared_ptr<comm::Communicator>& world) {
    require_memory(options, *world);
    const std::vector<CommRow> rows = measure(options, *world);
    if (world->rank() != 0) return;
    if (options.json) {
      fmt::print("{}\n", Json{{"ranks", world->size()}, {"rows", rows_json(rows)}}.dump());
    } else {
      print_rows(rows, world->size());
    }
  });
}

}  // namespace

void add_bench_comm(CLI::App& bench) {
  auto options = std::make_shared<CommBenchOptions>();
  CLI::App* verb =
      bench.add_subcommand("comm", "The collectives, 4 KiB to 64 MiB, beside the machine's memcpy");
  verb->add_option("--max-mib", options->max_mib, "largest buffer, MiB")->capture_default_str();
  verb->add_option("--seconds", options->seconds, "measure each size of each verb for about this long")
      ->capture_default_str();
  add_launch_options(*verb, options->launch);
  verb->add_flag("--json", options->json, "print one JSON object");
  verb->footer(
      "Examples:\n"
      "  collegium bench comm --ranks 2\n"
      "  collegium bench comm --ranks 2 --backend local --json\n"
      "  collegium bench comm --backend local --emulate nodes=2x2,intra=3GB/s:20us,inter=500MB/s:100us "
      "--max-mib 4");
  verb->callback([options] { run(*options); });
}

}  // namespace collegium::cli
