// SPDX-License-Identifier: Apache-2.0
#pragma once

// A routing written to a file and read back in place of the router's choice: for comparisons in low
// precision, benchmarks and the simulator. The format: base/routing_file.h.

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <map>
#include <memory>

#include "collegium/base/file.h"
#include "collegium/moe/options.h"

namespace collegium::moe {

struct RoutingKey {
  std::int64_t step = 0;
  std::int64_t micro_step = 0;
  std::int64_t layer = 0;
  auto operator<=>(const RoutingKey&) const = default;
};

/// What     How many choices a token has in a record: K, or one for every expert where the experts choose.
std::int64_t record_width(const MoeOptions& options);

/// Throws   ConfigError when both name the same file, which recording would overwrite while it is read.
void require_different_files(const std::filesystem::path& record, const std::filesystem::path& replay);

class RoutingRecorder {
 public:
  /// What     Opens the file for the steps after `last_step`: a resumed run keeps the records of the steps
  ///          before.
  /// Throws   Error naming the path when it cannot be written; ConfigError when it should be continued and
  ///          is of another kind.
  explicit RoutingRecorder(const std::filesystem::path& path, std::int64_t last_step = 0);
  /// ids_TK int32 [T, K].
  void append(const RoutingKey& key, const at::Tensor& chosen_ids_TK, std::int64_t num_experts);
  void flush();

 private:
  struct Close {
    void operator()(std::FILE* file) const { std::fclose(file); }
  };
  std::filesystem::path path_;
  std::unique_ptr<std::FILE, Close> file_;
};

class RoutingReplay {
 public:
  /// Throws ConfigError naming the path and position for a file of another kind or a corrupt record.
  explicit RoutingReplay(const std::filesystem::path& path);
  /// Throws   ConfigError when the record is missing or has other sizes (with both numbers).
  void require(const RoutingKey& key, std::int64_t num_tokens, std::int64_t width,
               std::int64_t num_experts) const;
  /// What     int32 [T, record_width].
  /// Throws   ConfigError like require(), and when the record names an expert that does not exist.
  at::Tensor ids_TK(const RoutingKey& key, std::int64_t num_tokens, std::int64_t width,
                    std::int64_t num_experts) const;
  std::size_t num_records() const { return records_.size(); }

 private:
  struct Record {
    std::size_t offset = 0;               // of the ids
    std::array<std::int64_t, 3> sizes{};  // T, K, E
  };
  std::filesystem::path path_;
  MappedFile file_;
  std::map<RoutingKey, Record> records_;
};

}  // namespace collegium::moe
