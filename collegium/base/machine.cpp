// SPDX-License-Identifier: Apache-2.0
#include "collegium/base/machine.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <fstream>
#include <limits>
#include <thread>

#include "collegium/base/error.h"

namespace collegium {

double control_group_limit(const std::filesystem::path& root, std::istream& own_groups) {
  double least = std::numeric_limits<double>::infinity();
  const auto consider = [&least](const std::filesystem::path& file) {
    std::ifstream stream(file);
    double limit = 0.0;
    if (stream >> limit && limit > 0.0) least = std::min(least, limit);  // "max" is no number
  };
  // A line is number:controllers:/group; version 2 has no controllers.
  std::string line;
  while (std::getline(own_groups, line)) {
    const std::size_t first = line.find(':');
    const std::size_t second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    if (!controllers.empty() && controllers.find("memory") == std::string::npos) continue;
    const char* const file = controllers.empty() ? "memory.max" : "memory.limit_in_bytes";
    const std::filesystem::path top = controllers.empty() ? root : root / "memory";
    std::filesystem::path group = std::filesystem::path(line.substr(second + 1)).relative_path();
    for (; !group.empty(); group = group.parent_path()) consider(top / group / file);
    consider(top / file);
  }
  return least;
}

double machine_memory_bytes() {
  const double bytes =
      static_cast<double>(::sysconf(_SC_PHYS_PAGES)) * static_cast<double>(::sysconf(_SC_PAGE_SIZE));
  std::ifstream own_groups("/proc/self/cgroup");
  return std::min(bytes, control_group_limit("/sys/fs/cgroup", own_groups));
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
  constexpr std::int64_t kMostPerCore = 8;
  const std::int64_t cores = machine_cores();
  require_config(threads >= 0, "{} = {}: must not be negative (0 = a share of the cores)", path, threads);
  require_config(threads <= kMostPerCore * cores,
                 "{} = {}: must be at most {}, {} for each of this machine's {} cores", path, threads,
                 kMostPerCore * cores, kMostPerCore, cores);
}

int machine_cores() { return static_cast<int>(std::max(1U, std::thread::hardware_concurrency())); }

}  // namespace collegium
