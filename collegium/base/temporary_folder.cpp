// SPDX-License-Identifier: Apache-2.0
#include "collegium/base/temporary_folder.h"

#include <mutex>
#include <set>
#include <utility>

#include "collegium/base/error.h"
#include "collegium/base/file.h"

namespace collegium {

namespace {

struct Registry {
  std::mutex mutex;
  std::set<std::filesystem::path> paths;
};

// Never destroyed: remove_all() may be called while the program ends.
Registry& registry() {
  static auto* const instance = new Registry;
  return *instance;
}

void forget(const std::filesystem::path& path) {
  const std::lock_guard lock(registry().mutex);
  registry().paths.erase(path);
}

}  // namespace

TemporaryFolder::TemporaryFolder(std::filesystem::path path) : path_(std::move(path)) {
  {
    const std::lock_guard lock(registry().mutex);
    registry().paths.insert(path_);
  }
  std::error_code code;
  std::filesystem::create_directories(path_, code);
  if (!code) return;
  forget(path_);
  throw Error(fmt::format("cannot create {}: {}", path_.string(), code.message()));
}

TemporaryFolder::~TemporaryFolder() {
  if (path_.empty()) return;
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
  forget(path_);
}

void TemporaryFolder::move_to(const std::filesystem::path& final_path) {
  replace_folder(path_, final_path);
  forget(std::exchange(path_, {}));
}

void TemporaryFolder::remove_all() {
  const std::lock_guard lock(registry().mutex);
  std::error_code ignored;
  for (const std::filesystem::path& path : registry().paths) std::filesystem::remove_all(path, ignored);
}

}  // namespace collegium
