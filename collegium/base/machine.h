// SPDX-License-Identifier: Apache-2.0
#pragma once

// What this process may use of the machine it runs on.

#include <cstdint>
#include <string>
#include <string_view>

namespace collegium {

/// What     Memory that this machine has, or that a control group (a container) leaves to this process.
double machine_memory_bytes();

/// What     Logical cores of the machine, at least 1.
int machine_cores();

/// What     Refuses numbers of threads that can only be a slip: below 0 (0 = chosen), or more than 8 a core.
/// Throws   ConfigError naming `path`, the value and the bound.
void require_threads(std::int64_t threads, std::string_view path);

/// What     Equal on all ranks of one running kernel: containers share it, network namespaces too.
std::string machine_name();

}  // namespace collegium
