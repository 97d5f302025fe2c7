// SPDX-License-Identifier: Apache-2.0
#pragma once

// What this process may use of the machine it runs on.

#include <string>

namespace collegium {

/// What     Memory that this machine has, or that a control group (a container) leaves to this process.
double machine_memory_bytes();

/// What     Logical cores of the machine, at least 1.
int machine_cores();

constexpr int kMaxThreadsPerCore = 8;  ///< of a rank; more than that is a slip

/// What     Equal on all ranks of one running kernel: containers share it, network namespaces too.
std::string machine_name();

}  // namespace collegium
