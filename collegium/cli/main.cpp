// SPDX-License-Identifier: Apache-2.0
#include <c10/util/Exception.h>
#include <fmt/ranges.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <exception>
#include <new>
#include <thread>

#include "collegium/base/error.h"
#include "collegium/base/fields.h"
#include "collegium/base/log.h"
#include "collegium/cli/mpirun.h"
#include "collegium/cli/signals.h"
#include "collegium/cli/verb.h"
#include "collegium/comm/errors.h"
#include "collegium/comm/launcher.h"
#include "collegium/comm/mpi/mpi.h"
#include "collegium/ops/arena.h"

namespace {

constexpr int kFailed = 1;
constexpr int kWrongUsage = 2;
constexpr const char* kOutOfMemory = "out of memory: these sizes are too large for this machine";

// Which rank of a launcher's world this process is.
int launched_rank() {
  const auto claim = collegium::comm::find_launcher();
  return claim ? claim->rank : 0;
}

// Of the ranks of a launcher the first reports, and its end ends the others before it is their turn:
// processes start up to half a second apart, and mpirun takes as long again to end them. Who knows best is
// first, then rank 0: `others_know` is how many ranks may know better.
void wait_for_turn(std::size_t others_know = 0) {
  constexpr std::chrono::milliseconds kHeadStart{1000};
  constexpr std::chrono::milliseconds kDistance{20};
  const int rank = launched_rank();
  const auto place = rank > 0 ? kHeadStart + kDistance * std::min(rank, 50) : std::chrono::milliseconds(0);
  std::this_thread::sleep_for(3 * kHeadStart * std::min<std::size_t>(others_know, 3) + place);
}

// Shows what went wrong and ends the program, and with it the ranks that would wait for it: at once, because
// ranks that are threads may still be running.
[[noreturn]] void fail(const std::string& message, int exit_code, std::size_t others_know = 0) {
  collegium::cli::let_removal_end();
  if (!collegium::cli::report_to_starter(message, exit_code)) {
    wait_for_turn(others_know);
    fmt::print(stderr, "collegium: {}\n", message);
  }
  std::fflush(nullptr);
  collegium::comm::abort_mpi_world(exit_code);
}

// CLI11 would only say that an argument was not expected. `place` is where the verb stands.
void require_known_verb(const CLI::App& app, const std::vector<std::string>& arguments,
                        std::size_t place = 1) {
  if (arguments.size() <= place || arguments[place].starts_with('-')) return;
  std::vector<std::string> verbs;
  for (const CLI::App* verb : app.get_subcommands({})) {
    if (verb->get_name() == arguments[place]) {
      if (!verb->get_subcommands({}).empty()) require_known_verb(*verb, arguments, place + 1);
      return;
    }
    verbs.push_back(verb->get_name());
  }
  const auto nearest = collegium::nearest_name(arguments[place], verbs);
  throw collegium::ConfigError(fmt::format("no verb '{}'; {}", arguments[place],
                                           nearest ? fmt::format("did you mean '{}'?", *nearest)
                                                   : fmt::format("there are: {}", fmt::join(verbs, ", "))));
}

// What was printed may wait in a buffer, and the disk that it goes to may be full.
void require_written() {
  if (std::fflush(stdout) == 0 && std::ferror(stdout) == 0) return;
  throw collegium::Error(fmt::format("cannot write to standard output: {}",
                                     std::strerror(errno)));  // NOLINT(concurrency-mt-unsafe): at the end
}

int run(int argc, char** argv) {
  CLI::App app("Collegium trains Mixture-of-Experts language models and shows what every expert did.",
               "collegium");
  app.require_subcommand(1);
  app.failure_message(CLI::FailureMessage::simple);
  app.set_version_flag("--version", "collegium 0.1.0");
  collegium::cli::add_prepare(app);
  collegium::cli::add_train(app);
  collegium::cli::add_eval(app);
  collegium::cli::add_generate(app);
  collegium::cli::add_inspect(app);
  collegium::cli::add_bench(app);
  collegium::cli::add_doctor(app);
  collegium::cli::add_plan(app);
  collegium::cli::add_simulate(app);
  collegium::cli::add_verify(app);
  try {
    std::vector<std::string> arguments = collegium::cli::program_arguments(argc, argv);
    require_known_verb(app, arguments);
    // CLI11 takes them without the name, the last first.
    std::reverse(arguments.begin(), arguments.end());
    arguments.pop_back();
    app.parse(std::move(arguments));
    require_written();
    return 0;
  } catch (const CLI::ParseError& error) {
    wait_for_turn();
    return app.exit(error) == 0 ? 0 : kWrongUsage;
  } catch (const collegium::cli::RanksFailed& error) {
    fail(error.what(), error.exit_code());
  } catch (const collegium::ConfigError& error) {
    fail(error.what(), kWrongUsage);
  } catch (const collegium::comm::NoAnswer& error) {
    fail(error.what(), kFailed, std::max<std::size_t>(error.num_missing(), 1) - 1);
  } catch (const c10::Error& error) {
    if (std::string(error.what_without_backtrace()).find("can't allocate memory") != std::string::npos)
      fail(kOutOfMemory, kFailed);
    fail(fmt::format("internal error: {}", error.what_without_backtrace()), kFailed);
  } catch (const std::bad_alloc&) {
    fail(kOutOfMemory, kFailed);
  } catch (const std::exception& error) {
    fail(error.what(), kFailed);
  }
}

}  // namespace

int main(int argc, char** argv) {
  collegium::set_log_sink([](collegium::LogLevel level, std::string_view message) {
    fmt::print(stderr, "{}{}\n", level == collegium::LogLevel::kWarning ? "warning: " : "", message);
  });
  collegium::ops::install_arena();
  return run(argc, argv);
}
