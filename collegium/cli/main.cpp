// SPDX-License-Identifier: Apache-2.0
#include <c10/util/Exception.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <exception>
#include <new>
#include <thread>

#include "collegium/base/error.h"
#include "collegium/base/log.h"
#include "collegium/cli/command_line.h"
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

int run(int argc, char** argv) {
  CLI::App app("Collegium trains Mixture-of-Experts language models and shows what every expert did.",
               "collegium");
  app.require_subcommand(1);
  app.failure_message(CLI::FailureMessage::simple);
  app.set_version_flag("--version", fmt::format("collegium {}", collegium::cli::kVersion));
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
    collegium::cli::run_verb(app, collegium::cli::program_arguments(argc, argv), [] { wait_for_turn(); });
    return 0;
  } catch (const CLI::ParseError& error) {
    wait_for_turn();
    app.exit(error);
    return kWrongUsage;
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
