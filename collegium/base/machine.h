// SPDX-License-Identifier: Apache-2.0
#pragma once

// What this process may use of the machine it runs on.

#include <cstdint>
#include <filesystem>
#include <istream>
#include <string>
#include <string_view>

namespace collegium {

/// What     Memory that this machine has, or that a control group (a container) leaves to this process.
double machine_memory_bytes();

/// What     The least limit of the control groups that a process is in and of those around them, bytes;
///          infinity where there is none. `root` is where they are mounted, `own_groups` what
///          /proc/self/cgroup says, of version 1 or 2.
double control_group_limit(const std::filesystem::path& root, std::istream& own_groups);

/// What     Logical cores of the machine, at least 1.
int machine_cores();

/// What     Refuses numbers of threads that can only be a slip: below 0 (0 = chosen), or more than 8 a core.
/// Throws   ConfigError naming `path`, the value and the bound.
void require_threads(std::int64_t threads, std::string_view path);

/// What     Equal on all ranks of one running kernel: containers share it, network namespaces too.
std::string machine_name();

}  // namespace collegium
