// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <functional>
#include <optional>
#include <string>

namespace collegium::comm {

/// What a launcher (mpirun, srun) says in the environment about this process.
struct LauncherClaim {
  std::string variable;  ///< for instance "PMI_SIZE"
  int ranks = 1;
};

/// What     The first launcher variable that counts more than one rank; nothing when there is none: then
///          this process was started alone. `variable_value` looks an environment variable up (nullptr: not
///          set).
std::optional<LauncherClaim> find_launcher(const std::function<const char*(const char*)>& variable_value);

/// What     find_launcher() in this process's environment.
std::optional<LauncherClaim> find_launcher();

/// What     Refuses a launcher of another MPI, which starts N worlds of one rank each.
/// Throws   ConfigError when the launcher counts more ranks than the world has and the world has one.
void refuse_foreign_launcher(int world_size, const std::optional<LauncherClaim>& claim);

}  // namespace collegium::comm
