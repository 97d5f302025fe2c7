// SPDX-License-Identifier: Apache-2.0
#pragma once

// One function per verb adds its subcommand, options and callback. main.cpp maps exceptions to exit codes:
// 0 done, 1 failed (Error), 2 wrong usage or configuration (ConfigError, CLI11's parse errors).

#include "collegium/cli/app.h"

namespace collegium::cli {

void add_prepare(CLI::App& app);
void add_train(CLI::App& app);
void add_eval(CLI::App& app);
void add_generate(CLI::App& app);
void add_inspect(CLI::App& app);
void add_bench(CLI::App& app);
void add_doctor(CLI::App& app);
void add_plan(CLI::App& app);
void add_simulate(CLI::App& app);
void add_verify(CLI::App& app);

}  // namespace collegium::cli
