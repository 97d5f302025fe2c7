// SPDX-License-Identifier: Apache-2.0
#include "collegium/train/machine_folder.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/scalar_tensor.h>

#include <cstring>
#include <random>

#include "collegium/base/error.h"
#include "collegium/base/file.h"
#include "collegium/train/on_all_ranks.h"

namespace collegium::train {

MachineFolder::MachineFolder(const std::shared_ptr<comm::Communicator>& world, const std::string& name,
                             const std::function<void(const std::filesystem::path&)>& fill)
    : MachineFolder(world, comm::Seats(*world), name, fill, std::filesystem::temp_directory_path()) {}

MachineFolder::MachineFolder(const std::shared_ptr<comm::Communicator>& world, const comm::Seats& seats,
                             const std::string& name,
                             const std::function<void(const std::filesystem::path&)>& fill,
                             const std::filesystem::path& parent)
    : world_(world), one_machine_(seats.first_ranks().size() == 1) {
  // A name that no other run has, on any of the machines.
  const at::Tensor number = at::scalar_tensor(static_cast<std::int64_t>(std::random_device()()), at::kLong);
  world_->broadcast(number, 0).wait();
  path_ = parent / fmt::format("{}-{:08x}", name, number.item<std::int64_t>());
  const auto make = [&](bool here) {
    on_all_ranks(*world_, [&] {
      if (here) {
        own_ = std::make_unique<TemporaryFolder>(path_);
        fill(path_);
      }
      return Json();
    });
  };
  make(world_->rank() == 0);
  // Machines may share the parent: then rank 0's is there already.
  make(world_->rank() != 0 && world_->rank() == seats.neighbours().front() && !path_exists(path_));
}

void MachineFolder::share(const std::string& name) {
  if (one_machine_) return world_->barrier();
  std::string content;
  if (world_->rank() == 0) content = read_file(path_ / name);
  const at::Tensor size = at::scalar_tensor(static_cast<std::int64_t>(content.size()), at::kLong);
  world_->broadcast(size, 0).wait();
  const at::Tensor bytes = at::empty({size.item<std::int64_t>()}, at::kByte);
  if (world_->rank() == 0) std::memcpy(bytes.mutable_data_ptr(), content.data(), content.size());
  world_->broadcast(bytes, 0).wait();
  on_all_ranks(*world_, [&] {
    if (own_ && world_->rank() != 0) {
      write_file_atomically(path_ / name, {static_cast<const char*>(bytes.const_data_ptr()), bytes.nbytes()});
    }
    return Json();
  });
}

}  // namespace collegium::train
