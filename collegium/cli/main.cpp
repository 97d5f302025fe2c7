// SPDX-License-Identifier: Apache-2.0
#include <c10/util/Exception.h>

#include <cstdio>
#include <exception>

#include "collegium/base/error.h"
#include "collegium/base/log.h"
#include "collegium/cli/verb.h"

namespace {

constexpr int kFailed = 1;
constexpr int kWrongUsage = 2;

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
  collegium::cli::add_doctor(app);
  collegium::cli::add_plan(app);
  collegium::cli::add_simulate(app);
  try {
    app.parse(argc, argv);
    return 0;
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : kWrongUsage;
  } catch (const collegium::ConfigError& error) {
    fmt::print(stderr, "collegium: {}\n", error.what());
    return kWrongUsage;
  } catch (const c10::Error& error) {
    fmt::print(stderr, "collegium: internal error: {}\n", error.what_without_backtrace());
    return kFailed;
  } catch (const std::exception& error) {
    fmt::print(stderr, "collegium: {}\n", error.what());
    return kFailed;
  }
}

}  // namespace

int main(int argc, char** argv) {
  collegium::set_log_sink([](collegium::LogLevel level, std::string_view message) {
    fmt::print(stderr, "{}{}\n", level == collegium::LogLevel::kWarning ? "warning: " : "", message);
  });
  return run(argc, argv);
}
