// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <filesystem>

namespace collegium {

/// What     A folder that is removed, with all that is in it, when this object is gone, or by
///          remove_all().
/// Throws   Error naming the path and the system's reason: it cannot be made, or is there already.
class TemporaryFolder {
 public:
  explicit TemporaryFolder(std::filesystem::path path);
  ~TemporaryFolder();
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;

  const std::filesystem::path& path() const { return path_; }

  /// What     Gives it its final name and lets go of it (replace_folder() of base/file.h).
  void move_to(const std::filesystem::path& final_path);

  /// What     Removes all of this process's: for a program that a signal is about to end. They may be in use
  ///          in another thread, whose next access fails.
  static void remove_all();

 private:
  std::filesystem::path path_;  // empty: moved
};

}  // namespace collegium
