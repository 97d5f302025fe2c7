// SPDX-License-Identifier: Apache-2.0
#include "collegium/comm/launcher.h"

#include <array>
#include <charconv>
#include <cstdlib>
#include <cstring>

#include "collegium/base/error.h"

namespace collegium::comm {

std::optional<LauncherClaim> find_launcher(const std::function<const char*(const char*)>& variable_value) {
  // Open MPI; MPICH, Intel MPI and srun with PMI; MVAPICH; srun's own. Inside an allocation SLURM_NTASKS is
  // set for programs that srun did not start too, SLURM_PROCID tells them apart from the second task on.
  constexpr std::array kVariables = {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE",
                                     "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"};
  for (const char* variable : kVariables) {
    const char* text = variable_value(variable);
    if (text == nullptr) continue;
    if (std::strcmp(variable, "SLURM_NTASKS") == 0 && variable_value("SLURM_PROCID") == nullptr) continue;
    int ranks = 0;
    const auto result = std::from_chars(text, text + std::strlen(text), ranks);
    if (result.ec == std::errc() && ranks > 1) return LauncherClaim{.variable = variable, .ranks = ranks};
  }
  return std::nullopt;
}

std::optional<LauncherClaim> find_launcher() {
  return find_launcher([](const char* name) {
    return std::getenv(name);  // NOLINT(concurrency-mt-unsafe): nothing here changes the environment
  });
}

void refuse_foreign_launcher(int world_size, const std::optional<LauncherClaim>& claim) {
  if (!claim || world_size > 1) return;
  throw ConfigError(fmt::format(
      "{} = {}, but the MPI world has 1 rank: the launcher belongs to another MPI than the one Collegium "
      "was built with, so {} separate runs would start; use the mpirun of the same installation "
      "(`collegium doctor` names it), or under Slurm `srun --mpi=pmix`",
      claim->variable, claim->ranks, claim->ranks));
}

}  // namespace collegium::comm
