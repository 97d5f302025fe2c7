// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <filesystem>
#include <functional>
#include <memory>
#include <string>

#include "collegium/base/temporary_folder.h"
#include "collegium/comm/seats.h"

namespace collegium::train {

/// What     A temporary folder on every machine, under one name: the machine's first rank fills and removes
///          it, all its ranks read it.
/// Comm     broadcast, on_all_ranks(); share(): two broadcasts, on_all_ranks(). Collective, but for the
///          destructor, before which the ranks must be through with the folder.
/// Throws   what `fill` throws, or that files cannot be written; on the other ranks PeerFailure.
class MachineFolder {
 public:
  /// What     `fill` runs on every machine's first rank, and must write the same on all.
  MachineFolder(const std::shared_ptr<comm::Communicator>& world, const std::string& name,
                const std::function<void(const std::filesystem::path&)>& fill);
  /// The same in `parent`, where `seats` says which machine is whose.
  MachineFolder(const std::shared_ptr<comm::Communicator>& world, const comm::Seats& seats,
                const std::string& name, const std::function<void(const std::filesystem::path&)>& fill,
                const std::filesystem::path& parent);

  const std::filesystem::path& path() const { return path_; }

  /// What     Gives every machine the file `name` of rank 0's folder. All ranks see it when one returns.
  void share(const std::string& name);

 private:
  std::shared_ptr<comm::Communicator> world_;
  std::filesystem::path path_;
  bool one_machine_;
  std::unique_ptr<TemporaryFolder> own_;  // on the first rank of a machine
};

}  // namespace collegium::train
