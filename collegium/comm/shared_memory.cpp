// SPDX-License-Identifier: Apache-2.0
#include "collegium/comm/shared_memory.h"

#include <ATen/ops/tensor.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>

#include "collegium/base/error.h"

namespace collegium::comm {

namespace {

// A file that only lives in memory.
class File {
 public:
  explicit File(int descriptor) : descriptor_(descriptor) {}
  ~File() {
    if (descriptor_ >= 0) close(descriptor_);
  }
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  int descriptor() const { return descriptor_; }

 private:
  int descriptor_;
};

// What went wrong on a rank; 0 = nothing.
using Errno = std::int64_t;

struct Mapping {
  void* data = nullptr;
  Errno error = 0;
};

Mapping map_file(const File& file, std::int64_t bytes) {
  if (file.descriptor() < 0) return {.error = errno};
  void* data = mmap(nullptr, static_cast<std::size_t>(bytes), PROT_READ | PROT_WRITE, MAP_SHARED,
                    file.descriptor(), 0);
  if (data == MAP_FAILED) return {.error = errno};
  return {.data = data};
}

}  // namespace

std::shared_ptr<SharedMemory> SharedMemory::create(Communicator& group, std::int64_t bytes) {
  COLLEGIUM_CHECK(bytes > 0, "{} bytes of shared memory", bytes);
  constexpr int kOwner = 0;
  const bool owner = group.rank() == kOwner;
  const File made(owner ? memfd_create("collegium", MFD_CLOEXEC) : -1);
  Errno error = 0;
  if (owner && (made.descriptor() < 0 || ftruncate(made.descriptor(), bytes) != 0)) error = errno;
  // Other processes of the machine open it by its owner's number and descriptor.
  const at::Tensor where = at::tensor(
      {static_cast<std::int64_t>(getpid()), static_cast<std::int64_t>(made.descriptor())}, at::kLong);
  group.broadcast(where, kOwner).wait();
  const auto* numbers = where.const_data_ptr<std::int64_t>();
  const std::string path = fmt::format("/proc/{}/fd/{}", numbers[0], numbers[1]);
  Mapping mapping{.error = error};
  if (error == 0) {
    const File opened(open(path.c_str(), O_RDWR | O_CLOEXEC));
    mapping = map_file(opened, bytes);
  }
  std::shared_ptr<SharedMemory> memory;
  if (mapping.error == 0) memory.reset(new SharedMemory(static_cast<std::byte*>(mapping.data), bytes));
  // The owner's file stays open until all have it.
  const at::Tensor worst = at::tensor({mapping.error}, at::kLong);
  group.all_reduce(worst, ReduceOp::kMax).wait();
  const auto code = static_cast<int>(*worst.const_data_ptr<std::int64_t>());
  if (code != 0)
    throw Error(fmt::format("group '{}': {} bytes of shared memory ({}) cannot be had on every rank: {}",
                            group.name(), bytes, path, std::generic_category().message(code)));
  return memory;
}

SharedMemory::~SharedMemory() { munmap(data_, static_cast<std::size_t>(bytes_)); }

}  // namespace collegium::comm
