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
  std::error_code code;
  if (path_.has_parent_path()) std::filesystem::create_directories(path_.parent_path(), code);
  // One that is there already is somebody else's.
  if (!code && !std::filesystem::create_directory(path_, code) && !code)
    code = std::make_error_code(std::errc::file_exists);
  if (code) throw Error(fmt::format("cannot create {}: {}", path_.string(), code.message()));
  const std::lock_guard lock(registry().mutex);
  registry().paths.insert(path_);
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
