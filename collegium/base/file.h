// SPDX-License-Identifier: Apache-2.0
#pragma once

// Files: whole reads, atomic writes (temporary name, fsync, rename), read-only memory maps, checksums.

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>

namespace collegium {

/// What     Whether there is something at a path, a folder, or a file; links are followed.
/// Throws   ConfigError naming the path and the system's reason when the system does not say (no permission,
///          a name too long).
bool path_exists(const std::filesystem::path& path);
bool is_folder(const std::filesystem::path& path);
bool is_file(const std::filesystem::path& path);

/// What     The whole content of a file.
/// Throws   ConfigError naming the path and the system's reason when it cannot be read.
std::string read_file(const std::filesystem::path& path);

/// What     Writes a file so that a reader sees the old content or the new one, never a part: the bytes go to
///          a temporary name in the same folder, are synced to disk, and renamed. A link is followed, and
///          what is no regular file (a device, a pipe) is written to as it is.
/// Throws   Error naming the path and the system's reason (full disk, no permission); the temporary file is
///          removed.
class AtomicFile {
 public:
  explicit AtomicFile(std::filesystem::path path);
  ~AtomicFile();  ///< discards what was not committed
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  void write(std::span<const std::byte> bytes);
  void write(std::string_view text);
  /// Syncs, renames to the final name, syncs the folder.
  void commit();

 private:
  std::filesystem::path path_;
  std::filesystem::path temporary_path_;  // empty for a device or a pipe
  int descriptor_ = -1;
};

/// AtomicFile for content that is at hand as one text.
void write_file_atomically(const std::filesystem::path& path, std::string_view text);

/// What     Refuses to begin what would be written to a folder that is not there; `option` names the file.
/// Throws   ConfigError naming option, file and folder.
void require_folder_of(const std::filesystem::path& file, std::string_view option);

/// What     Makes a folder's entries durable (fsync of the folder): call after creating or renaming inside
///          it.
void sync_folder(const std::filesystem::path& folder);

/// What     Gives the folder `from` the name `to`. Where `to` exists the two names are exchanged in one step:
///          a program that is killed leaves one of them complete under that name. What was there is then
///          removed; a link is replaced itself, not the folder that it leads to. On file systems that cannot
///          exchange names (NFS) the former one makes room first.
/// Throws   Error naming both paths and the system's reason; `to` is then what it was. Error when the former
///          one cannot be removed.
void replace_folder(const std::filesystem::path& from, const std::filesystem::path& to);

/// What     Keeps a folder for this process, until it is gone or the process ends, however it ends. Where the
///          file system locks no folders (NFS), everyone gets in.
/// Throws   ConfigError naming the folder: another process keeps it. Error: it cannot be opened.
class FolderLock {
 public:
  explicit FolderLock(const std::filesystem::path& folder);
  ~FolderLock();
  FolderLock(const FolderLock&) = delete;
  FolderLock& operator=(const FolderLock&) = delete;

 private:
  int descriptor_ = -1;
};

/// What     A read-only memory map of a whole file; an empty file maps to an empty span.
/// Throws   ConfigError naming the path when it cannot be opened or mapped.
class MappedFile {
 public:
  MappedFile() = default;
  explicit MappedFile(const std::filesystem::path& path);
  ~MappedFile();
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  std::span<const std::byte> bytes() const { return {data_, size_}; }

 private:
  const std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

/// What     XXH3 64-bit checksum, as 16 hexadecimal digits.
std::string checksum(std::span<const std::byte> bytes);
/// The same of a file's content (memory-mapped).
std::string checksum_file(const std::filesystem::path& path);

}  // namespace collegium
