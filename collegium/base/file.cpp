// SPDX-License-Identifier: Apache-2.0
#include "collegium/base/file.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <utility>

#include "collegium/base/error.h"

namespace collegium {

namespace {

constexpr mode_t kFileMode = 0644;

std::string system_reason() { return std::strerror(errno); }  // NOLINT(concurrency-mt-unsafe)

// A device, a pipe or a terminal: there is no older content to protect, and a rename would destroy the node.
bool is_special(const std::filesystem::path& path) {
  struct stat status{};
  return ::stat(path.c_str(), &status) == 0 && !S_ISREG(status.st_mode);
}

// The file that links lead to, which may not exist yet: renaming onto a link would replace the link.
std::filesystem::path follow_links(std::filesystem::path path) {
  constexpr int kMaxLinks = 40;  // as Linux itself
  std::error_code code;
  for (int i = 0; i < kMaxLinks && std::filesystem::is_symlink(path, code); ++i) {
    const std::filesystem::path target = std::filesystem::read_symlink(path, code);
    if (code) break;
    path = path.parent_path() / target;  // an absolute target replaces the whole
  }
  return path;
}

void rename_folder(const std::filesystem::path& from, const std::filesystem::path& to) {
  if (::rename(from.c_str(), to.c_str()) != 0)
    throw Error(fmt::format("cannot rename {} to {}: {}", from.string(), to.string(), system_reason()));
}

// Returns where the folder that was called `to` is now.
std::filesystem::path take_name(const std::filesystem::path& from, const std::filesystem::path& to) {
  if (::renameat2(AT_FDCWD, from.c_str(), AT_FDCWD, to.c_str(), RENAME_EXCHANGE) == 0) return from;
  if (errno != EINVAL && errno != ENOSYS)
    throw Error(fmt::format("cannot rename {} to {}: {}", from.string(), to.string(), system_reason()));
  std::filesystem::path former = from;
  former += "-replaced";
  rename_folder(to, former);
  try {
    rename_folder(from, to);
  } catch (const Error&) {
    rename_folder(former, to);
    throw;
  }
  return former;
}

std::filesystem::file_status status_of(const std::filesystem::path& path) {
  std::error_code code;
  const std::filesystem::file_status status = std::filesystem::status(path, code);
  require_config(std::filesystem::status_known(status), "cannot read {}: {}", path.string(), code.message());
  return status;
}

}  // namespace

bool path_exists(const std::filesystem::path& path) { return std::filesystem::exists(status_of(path)); }

bool is_folder(const std::filesystem::path& path) { return std::filesystem::is_directory(status_of(path)); }

bool is_file(const std::filesystem::path& path) { return std::filesystem::is_regular_file(status_of(path)); }

std::string read_file(const std::filesystem::path& path) {
  const MappedFile file(path);
  const auto bytes = file.bytes();
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

AtomicFile::AtomicFile(std::filesystem::path path) : path_(std::move(path)) {
  if (is_special(path_)) {
    descriptor_ = ::open(path_.c_str(), O_WRONLY | O_CLOEXEC);
  } else {
    path_ = follow_links(path_);
    temporary_path_ = path_;
    temporary_path_ += fmt::format(".tmp-{}", ::getpid());
    descriptor_ = ::open(temporary_path_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, kFileMode);
    // Who may read what was there may read what takes its place, and nobody else.
    struct stat former{};
    constexpr mode_t kPermissions = 0777;
    if (descriptor_ >= 0 && ::stat(path_.c_str(), &former) == 0)
      ::fchmod(descriptor_, former.st_mode & kPermissions);
  }
  if (descriptor_ < 0) throw Error(fmt::format("cannot write {}: {}", path_.string(), system_reason()));
}

AtomicFile::~AtomicFile() {
  if (descriptor_ < 0) return;
  ::close(descriptor_);
  if (!temporary_path_.empty()) ::unlink(temporary_path_.c_str());
}

void AtomicFile::write(std::span<const std::byte> bytes) {
  COLLEGIUM_CHECK(descriptor_ >= 0, "write to {} after commit", path_.string());
  while (!bytes.empty()) {
    const ssize_t written = ::write(descriptor_, bytes.data(), bytes.size());
    if (written < 0) {
      if (errno == EINTR) continue;
      throw Error(fmt::format("cannot write {}: {}", path_.string(), system_reason()));
    }
    bytes = bytes.subspan(static_cast<std::size_t>(written));
  }
}

void AtomicFile::write(std::string_view text) { write(std::as_bytes(std::span(text.data(), text.size()))); }

void AtomicFile::commit() {
  COLLEGIUM_CHECK(descriptor_ >= 0, "{} committed twice", path_.string());
  if (temporary_path_.empty()) {
    if (::close(std::exchange(descriptor_, -1)) != 0)
      throw Error(fmt::format("cannot write {}: {}", path_.string(), system_reason()));
    return;
  }
  if (::fsync(descriptor_) != 0)
    throw Error(fmt::format("cannot sync {}: {}", path_.string(), system_reason()));
  ::close(std::exchange(descriptor_, -1));
  if (::rename(temporary_path_.c_str(), path_.c_str()) != 0) {
    const std::string reason = system_reason();
    ::unlink(temporary_path_.c_str());
    throw Error(fmt::format("cannot rename {} to {}: {}", temporary_path_.string(), path_.string(), reason));
  }
  sync_folder(path_.parent_path());
}

void write_file_atomically(const std::filesystem::path& path, std::string_view text) {
  AtomicFile file(path);
  file.write(text);
  file.commit();
}

void require_folder_of(const std::filesystem::path& file, std::string_view option) {
  const std::filesystem::path folder = file.parent_path();
  require_config(folder.empty() || is_folder(folder), "{} {}: there is no folder {}", option, file.string(),
                 folder.string());
}

void sync_folder(const std::filesystem::path& folder) {
  const std::filesystem::path target = folder.empty() ? std::filesystem::path(".") : folder;
  const int descriptor = ::open(target.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (descriptor < 0) throw Error(fmt::format("cannot open folder {}: {}", target.string(), system_reason()));
  const int status = ::fsync(descriptor);
  const std::string reason = status == 0 ? std::string() : system_reason();
  ::close(descriptor);
  if (status != 0) throw Error(fmt::format("cannot sync folder {}: {}", target.string(), reason));
}

void replace_folder(const std::filesystem::path& from, const std::filesystem::path& to) {
  std::error_code code;
  std::filesystem::path former;
  if (std::filesystem::exists(to, code)) {
    former = take_name(from, to);
  } else {
    rename_folder(from, to);
  }
  sync_folder(to.parent_path());
  if (former.empty()) return;
  std::filesystem::remove_all(former, code);
  if (code) {
    throw Error(fmt::format("{} is written, but what it replaced cannot be removed: {}: {}", to.string(),
                            former.string(), code.message()));
  }
}

FolderLock::FolderLock(const std::filesystem::path& folder)
    : descriptor_(::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)) {
  if (descriptor_ < 0)
    throw Error(fmt::format("cannot open folder {}: {}", folder.string(), system_reason()));
  if (::flock(descriptor_, LOCK_EX | LOCK_NB) == 0 || errno != EWOULDBLOCK) return;
  ::close(descriptor_);
  throw ConfigError(fmt::format(
      "{}: another process is writing there; wait until it ends, or name another folder", folder.string()));
}

FolderLock::~FolderLock() { ::close(descriptor_); }

MappedFile::MappedFile(const std::filesystem::path& path) {
  // Opening a pipe would wait for its writer.
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (descriptor < 0) throw ConfigError(fmt::format("cannot read {}: {}", path.string(), system_reason()));
  struct stat status{};
  if (::fstat(descriptor, &status) != 0 || !S_ISREG(status.st_mode)) {
    ::close(descriptor);
    throw ConfigError(fmt::format("cannot read {}: not a regular file", path.string()));
  }
  size_ = static_cast<std::size_t>(status.st_size);
  void* address = size_ == 0 ? nullptr : ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, descriptor, 0);
  const std::string reason = system_reason();
  ::close(descriptor);
  if (address == MAP_FAILED) throw ConfigError(fmt::format("cannot map {}: {}", path.string(), reason));
  data_ = static_cast<const std::byte*>(address);
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(const_cast<std::byte*>(data_), size_);
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

std::string checksum(std::span<const std::byte> bytes) {
  return fmt::format("{:016x}", XXH3_64bits(bytes.data(), bytes.size()));
}

std::string checksum_file(const std::filesystem::path& path) {
  const MappedFile file(path);
  return checksum(file.bytes());
}

}  // namespace collegium
