// SPDX-License-Identifier: Apache-2.0
#include "collegium/base/machine.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <fstream>
#include <thread>

#include "collegium/base/error.h"

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

void require_threads(std::int64_t threads, std::string_view path) {
  constexpr int kMostPerCore = 8;
  const int cores = machine_cores();
  require_config(threads >= 0, "{} = {}: must not be negative (0 = a share of the cores)", path, threads);
  require_config(threads <= kMostPerCore * cores,
                 "{} = {}: must be at most {}, {} for each of this machine's {} cores", path, threads,
                 kMostPerCore * cores, kMostPerCore, cores);
}

int machine_cores() { return static_cast<int>(std::max(1U, std::thread::hardware_concurrency())); }

}  // namespace collegium
