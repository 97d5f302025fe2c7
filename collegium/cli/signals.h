// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace collegium::cli {

/// What     From now on the first SIGINT, SIGTERM or SIGUSR1 only asks to stop (the step is finished and a
///          checkpoint written); a second one ends the process at once. mpirun passes SIGUSR1 on to the
///          ranks, where it would end them at once on the others. Ranks that are threads share the request;
///          ranks see it at different times and must agree before they act on it.
void install_stop_signals();
bool stop_requested();

}  // namespace collegium::cli
