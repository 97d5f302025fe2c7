// SPDX-License-Identifier: Apache-2.0
#include "collegium/comm/shared_memory.h"

#include <ATen/ops/tensor.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <random>
#include <string>
#include <string_view>
#include <system_error>

#include "collegium/base/error.h"

namespace collegium::comm {

namespace {

// A file that lives in memory alone.
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

// How a rank fared: 0, errno, or this.
using Status = std::int64_t;
constexpr Status kOtherFile = 1 << 20;  // the owner's process and descriptor are somebody else's here

struct Mapping {
  void* data = nullptr;
  Status status = 0;
};

std::string file_name(std::int64_t nonce) {
  return fmt::format("collegium-{:016x}", static_cast<std::uint64_t>(nonce));
}

// In another container or on another machine the same path may lead to another file.
bool leads_to(const std::string& path, const std::string& name) {
  std::array<char, 128> target{};
  const ssize_t length = readlink(path.c_str(), target.data(), target.size());
  return length > 0 &&
         std::string_view(target.data(), static_cast<std::size_t>(length)).starts_with("/memfd:" + name);
}

Mapping map_file(const std::string& path, const std::string& name, std::int64_t bytes) {
  const File file(open(path.c_str(), O_RDWR | O_CLOEXEC));
  if (file.descriptor() < 0) return {.status = errno};
  if (!leads_to(path, name)) return {.status = kOtherFile};
  void* data = mmap(nullptr, static_cast<std::size_t>(bytes), PROT_READ | PROT_WRITE, MAP_SHARED,
                    file.descriptor(), 0);
  if (data == MAP_FAILED) return {.status = errno};
  return {.data = data};
}

std::string status_text(Status status) {
  if (status == kOtherFile)
    return "a rank finds another file there: ranks are in different containers or on different machines";
  return std::generic_category().message(static_cast<int>(status));
}

}  // namespace

std::shared_ptr<SharedMemory> SharedMemory::create(Communicator& group, std::int64_t bytes) {
  COLLEGIUM_CHECK(bytes > 0, "{} bytes of shared memory", bytes);
  constexpr int kOwner = 0;
  const bool owner = group.rank() == kOwner;
  const auto nonce = static_cast<std::int64_t>(std::random_device{}()) << 32 | std::random_device{}();
  const File made(owner ? memfd_create(file_name(nonce).c_str(), MFD_CLOEXEC) : -1);
  const bool failed = owner && (made.descriptor() < 0 || ftruncate(made.descriptor(), bytes) != 0);
  const Status owner_status = failed ? errno : 0;
  // Other processes of the machine open it by its owner's number and descriptor.
  const at::Tensor facts = at::tensor(
      {static_cast<std::int64_t>(getpid()), std::int64_t{made.descriptor()}, nonce, owner_status}, at::kLong);
  group.broadcast(facts, kOwner).wait();
  const auto* fact = facts.const_data_ptr<std::int64_t>();
  const std::string path = fmt::format("/proc/{}/fd/{}", fact[0], fact[1]);
  const Mapping mapping =
      fact[3] != 0 ? Mapping{.status = fact[3]} : map_file(path, file_name(fact[2]), bytes);
  std::shared_ptr<SharedMemory> memory;
  if (mapping.status == 0) memory.reset(new SharedMemory(static_cast<std::byte*>(mapping.data), bytes));
  // The owner's file stays open until all have it.
  const at::Tensor worst = at::tensor({mapping.status}, at::kLong);
  group.all_reduce(worst, ReduceOp::kMax).wait();
  const Status status = *worst.const_data_ptr<std::int64_t>();
  if (status != 0)
    throw Error(fmt::format("group '{}': its ranks cannot share {} bytes of memory ({}): {}", group.name(),
                            bytes, path, status_text(status)));
  return memory;
}

SharedMemory::~SharedMemory() { munmap(data_, static_cast<std::size_t>(bytes_)); }

}  // namespace collegium::comm
