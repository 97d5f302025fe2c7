// SPDX-License-Identifier: Apache-2.0
#include "collegium/ops/arena.h"

#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>

#include "collegium/base/error.h"
#include "collegium/base/machine.h"

namespace collegium::ops {

namespace {

// A remainder smaller than this stays with its block.
constexpr std::size_t kLeastBlock = std::size_t{16} << 10U;

}  // namespace

Arena::Arena(std::size_t capacity_bytes) {
  for (capacity_ = capacity_bytes; capacity_ >= kLeastBlock; capacity_ /= 2) {
    void* range = ::mmap(nullptr, capacity_, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (range == MAP_FAILED) continue;
    base_ = static_cast<char*>(range);
    // Advice: a system without large pages ignores it.
    ::madvise(base_, capacity_, MADV_HUGEPAGE);
    add_free(base_, capacity_);
    return;
  }
  throw Error("the system reserves no addresses for tensors");
}

Arena::~Arena() { ::munmap(base_, capacity_); }

void Arena::add_free(char* begin, std::size_t bytes) {
  free_by_address_.emplace(begin, bytes);
  free_by_size_.emplace(bytes, begin);
}

void Arena::remove_free(std::map<char*, std::size_t>::iterator block) {
  free_by_size_.erase({block->second, block->first});
  free_by_address_.erase(block);
}

void* Arena::allocate(std::size_t bytes) {
  COLLEGIUM_CHECK(bytes > 0, "an empty block");
  if (bytes > capacity_) return nullptr;
  const std::size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  const std::lock_guard lock(mutex_);
  const auto found = free_by_size_.lower_bound({rounded, nullptr});
  if (found == free_by_size_.end()) return nullptr;
  const auto [size, begin] = *found;
  remove_free(free_by_address_.find(begin));
  std::size_t taken = size;
  if (size - rounded >= kLeastBlock) {
    taken = rounded;
    add_free(begin + taken, size - taken);
  }
  used_.emplace(begin, taken);
  statistics_.in_use_bytes += taken;
  statistics_.peak_bytes = std::max(statistics_.peak_bytes, statistics_.in_use_bytes);
  statistics_.touched_bytes =
      std::max(statistics_.touched_bytes, static_cast<std::size_t>(begin + taken - base_));
  return begin;
}

void Arena::deallocate(void* block) {
  const std::lock_guard lock(mutex_);
  const auto used = used_.find(static_cast<char*>(block));
  COLLEGIUM_CHECK(used != used_.end(), "a block that this arena did not give");
  char* begin = used->first;
  std::size_t bytes = used->second;
  statistics_.in_use_bytes -= bytes;
  used_.erase(used);
  const auto after = free_by_address_.find(begin + bytes);
  if (after != free_by_address_.end()) {
    bytes += after->second;
    remove_free(after);
  }
  const auto next = free_by_address_.lower_bound(begin);
  if (next != free_by_address_.begin()) {
    const auto before = std::prev(next);
    if (before->first + before->second == begin) {
      begin = before->first;
      bytes += before->second;
      remove_free(before);
    }
  }
  add_free(begin, bytes);
}

ArenaStatistics Arena::statistics() const {
  const std::lock_guard lock(mutex_);
  return statistics_;
}

void Arena::reset_peak() {
  const std::lock_guard lock(mutex_);
  statistics_.peak_bytes = statistics_.in_use_bytes;
}

namespace {

Arena* installed = nullptr;  // never destroyed: tensors may outlive main()

void release(void* block) {
  if (block != nullptr && installed->owns(block)) {
    installed->deallocate(block);
  } else {
    c10::free_cpu(block);
  }
}

class ArenaAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(std::size_t bytes) override {
    // Smaller ones are many, and malloc keeps those itself.
    constexpr std::size_t kSmall = std::size_t{64} << 10U;
    void* block = bytes >= kSmall ? installed->allocate(bytes) : nullptr;
    if (block == nullptr) block = c10::alloc_cpu(bytes);
    return {block, block, &release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* target, const void* source, std::size_t bytes) const override {
    default_copy_data(target, source, bytes);
  }
};

}  // namespace

void install_arena() {
  COLLEGIUM_CHECK(installed == nullptr, "the arena is installed already");
  installed = new Arena(static_cast<std::size_t>(machine_memory_bytes()));
  static ArenaAllocator allocator;
  c10::SetCPUAllocator(&allocator, /*priority=*/1);
}

ArenaStatistics arena_statistics() {
  return installed != nullptr ? installed->statistics() : ArenaStatistics{};
}

void reset_arena_peak() {
  if (installed != nullptr) installed->reset_peak();
}

}  // namespace collegium::ops
