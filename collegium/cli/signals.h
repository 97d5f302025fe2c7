// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace collegium::cli {

/// What     From now on the first SIGINT, SIGTERM or SIGUSR1 only asks to stop (the step is finished and a
///          checkpoint written); a second one ends the process at once. mpirun passes SIGUSR1 on to the
///          ranks, where it would end them at once on the others. Ranks that are threads share the request;
///          ranks see it at different times and must agree before they act on it.
void install_stop_signals();
bool stop_requested();

/// What     From now on SIGINT, SIGTERM and SIGUSR1 end the process only after its temporary folders
///          (base/temporary_folder.h) are removed. Calls after the first do nothing.
void remove_temporary_folders_on_signals();
/// What     Returns, unless such a signal has come: what fails now fails because of the removal, and must not
///          end the process before it is done.
void let_removal_end();

}  // namespace collegium::cli
