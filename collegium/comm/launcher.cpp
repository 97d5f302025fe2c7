// SPDX-License-Identifier: Apache-2.0
#include "collegium/comm/launcher.h"

#include <array>
#include <charconv>
#include <cstdlib>
#include <cstring>

#include "collegium/base/error.h"

namespace collegium::comm {

namespace {

struct LauncherVariables {
  const char* ranks;
  const char* rank;
  int fewest_ranks;  ///< from how many on it is a claim
};

// Open MPI; MPICH, Intel MPI and srun with PMI; MVAPICH; srun's own. Not SLURM_NTASKS, which is set for
// everything inside an allocation, the batch script too.
constexpr std::array<LauncherVariables, 4> kLaunchers = {{{"OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", 1},
                                                          {"PMI_SIZE", "PMI_RANK", 2},
                                                          {"MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK", 2},
                                                          {"SLURM_STEP_NUM_TASKS", "SLURM_PROCID", 2}}};

std::optional<int> number_of(const char* text) {
  int number = 0;
  if (text == nullptr || std::from_chars(text, text + std::strlen(text), number).ec != std::errc()) return {};
  return number;
}

}  // namespace

std::optional<LauncherClaim> find_launcher(const std::function<const char*(const char*)>& variable_value) {
  for (const LauncherVariables& launcher : kLaunchers) {
    const std::optional<int> ranks = number_of(variable_value(launcher.ranks));
    if (ranks.value_or(0) < launcher.fewest_ranks) continue;
    return LauncherClaim{.variable = launcher.ranks,
                         .ranks = *ranks,
                         .rank = number_of(variable_value(launcher.rank)).value_or(0)};
  }
  return std::nullopt;
}

std::optional<LauncherClaim> find_launcher() {
  return find_launcher([](const char* name) {
    return std::getenv(name);  // NOLINT(concurrency-mt-unsafe): nothing here changes the environment
  });
}

void refuse_foreign_launcher(int world_size, const std::optional<LauncherClaim>& claim) {
  if (!claim || claim->ranks <= 1 || world_size > 1) return;
  throw ConfigError(fmt::format(
      "{} = {}, but the MPI world has 1 rank: the launcher belongs to another MPI than the one Collegium "
      "was built with, so {} separate runs would start; use the mpirun of the same installation "
      "(`collegium doctor` names it), or under Slurm `srun --mpi=pmix`",
      claim->variable, claim->ranks, claim->ranks));
}

}  // namespace collegium::comm
