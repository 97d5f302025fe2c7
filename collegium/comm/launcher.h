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
  int rank = 0;  ///< which of them this process is
};

/// What     What the first launcher variable says; nothing when there is none: then this process was started
///          alone. A Slurm step of one task makes no claim: it may start ranks of its own. `variable_value`
///          looks an environment variable up (nullptr: not set).
std::optional<LauncherClaim> find_launcher(const std::function<const char*(const char*)>& variable_value);

/// What     find_launcher() in this process's environment.
std::optional<LauncherClaim> find_launcher();

/// What     Refuses a launcher of another MPI, which starts N worlds of one rank each.
/// Throws   ConfigError when the world has one rank and the launcher counts more.
void refuse_foreign_launcher(int world_size, const std::optional<LauncherClaim>& claim);

}  // namespace collegium::comm
