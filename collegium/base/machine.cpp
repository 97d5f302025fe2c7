// SPDX-License-Identifier: Apache-2.0
#include "collegium/base/machine.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <fstream>
#include <thread>

namespace collegium {

double machine_memory_bytes() {
  double bytes =
      static_cast<double>(::sysconf(_SC_PHYS_PAGES)) * static_cast<double>(::sysconf(_SC_PAGE_SIZE));
  // Version 2 and version 1; "max" and missing files leave the machine's own size.
  for (const char* file : {"/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"}) {
    std::ifstream stream(file);
    double limit = 0.0;
    if (stream >> limit && limit > 0.0) bytes = std::min(bytes, limit);
  }
  return bytes;
}

std::string machine_name() {
  std::string name;
  std::ifstream("/proc/sys/kernel/random/boot_id") >> name;
  if (!name.empty()) return name;
  std::array<char, 256> host{};
  ::gethostname(host.data(), host.size() - 1);
  return host.data();
}

int machine_cores() { return static_cast<int>(std::max(1U, std::thread::hardware_concurrency())); }

}  // namespace collegium
