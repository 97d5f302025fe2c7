// SPDX-License-Identifier: Apache-2.0
#include "collegium/cli/verb.h"

namespace collegium::cli {

void add_doctor(CLI::App& app) {
  app.add_subcommand("doctor", "What was found on this machine, and what it means");
}

}  // namespace collegium::cli
