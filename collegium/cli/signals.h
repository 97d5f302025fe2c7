// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace collegium::cli {

/// What     From now on the first SIGINT or SIGTERM only asks to stop (the step is finished and a checkpoint
/// written); a
///          second one ends the process at once.
void install_stop_signals();
bool stop_requested();

}  // namespace collegium::cli
