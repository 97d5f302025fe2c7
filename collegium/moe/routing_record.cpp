// SPDX-License-Identifier: Apache-2.0
#include "collegium/moe/routing_record.h"

#include <ATen/ops/empty.h>
#include <xxhash.h>

#include <cerrno>
#include <cstring>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "collegium/base/error.h"

namespace collegium::moe {

namespace {

constexpr std::string_view kMagic = "CLGROUT1";
using Header = std::array<std::int64_t, 6>;

struct Entry {
  RoutingKey key;
  std::array<std::int64_t, 3> sizes{};  // T, K, E
  std::size_t begin = 0;
  std::size_t ids = 0;
  std::size_t end = 0;
};

std::uint64_t record_checksum(const std::byte* record, std::size_t size) { return XXH3_64bits(record, size); }

// The record at `offset`, checked; nothing at the end of the file and at a torn tail.
std::optional<Entry> read_entry(std::span<const std::byte> bytes, std::size_t offset,
                                const std::filesystem::path& path) {
  if (bytes.size() - offset < sizeof(Header)) return std::nullopt;
  Header header{};
  std::memcpy(header.data(), bytes.data() + offset, sizeof(header));
  const auto [step, micro_step, layer, num_tokens, width, num_experts] = header;
  constexpr std::int64_t kMaxTokens = std::int64_t{1} << 40;
  constexpr std::int64_t kMaxExperts = std::int64_t{1} << 20;
  require_config(num_tokens >= 0 && num_tokens < kMaxTokens && width >= 1 && width <= num_experts &&
                     num_experts <= kMaxExperts,
                 "{}: corrupt routing record at byte {}: {} tokens, {} of {} experts", path.string(), offset,
                 num_tokens, width, num_experts);
  const auto ids_bytes = static_cast<std::size_t>(num_tokens * width) * sizeof(std::int32_t);
  const Entry entry{.key = {.step = step, .micro_step = micro_step, .layer = layer},
                    .sizes = {num_tokens, width, num_experts},
                    .begin = offset,
                    .ids = offset + sizeof(Header),
                    .end = offset + sizeof(Header) + ids_bytes + sizeof(std::uint64_t)};
  if (entry.end > bytes.size()) return std::nullopt;
  std::uint64_t sum = 0;
  std::memcpy(&sum, bytes.data() + entry.end - sizeof(sum), sizeof(sum));
  require_config(sum == record_checksum(bytes.data() + offset, sizeof(Header) + ids_bytes),
                 "{}: corrupt routing record at byte {}: wrong checksum", path.string(), offset);
  return entry;
}

std::vector<Entry> read_entries(const MappedFile& file, const std::filesystem::path& path) {
  const auto bytes = file.bytes();
  require_config(
      bytes.size() >= kMagic.size() && std::memcmp(bytes.data(), kMagic.data(), kMagic.size()) == 0,
      "{}: not a routing record (it does not begin with \"{}\")", path.string(), kMagic);
  std::vector<Entry> entries;
  for (auto entry = read_entry(bytes, kMagic.size(), path); entry;
       entry = read_entry(bytes, entry->end, path))
    entries.push_back(*entry);
  return entries;
}

// Where the records of steps up to `last_step` end.
std::size_t end_of_step(const std::filesystem::path& path, std::int64_t last_step) {
  const MappedFile file(path);
  std::size_t end = kMagic.size();
  for (const Entry& entry : read_entries(file, path)) {
    if (entry.key.step > last_step) break;
    end = entry.end;
  }
  return end;
}

}  // namespace

std::int64_t record_width(const MoeOptions& options) {
  return options.router.selection == Selection::kExpertChoice ? options.num_experts : options.top_k;
}

void require_different_files(const std::filesystem::path& record, const std::filesystem::path& replay) {
  std::error_code ignored;
  require_config(!std::filesystem::equivalent(record, replay, ignored),
                 "--record-routing {}: is the file that --replay-routing reads; name another",
                 record.string());
}

RoutingRecorder::RoutingRecorder(const std::filesystem::path& path, std::int64_t last_step) : path_(path) {
  const bool continues = last_step > 0 && std::filesystem::is_regular_file(path);
  if (continues) {
    const std::size_t end = end_of_step(path, last_step);
    std::error_code code;
    std::filesystem::resize_file(path, end, code);
    if (code) throw Error(fmt::format("cannot write {}: {}", path.string(), code.message()));
  }
  file_.reset(std::fopen(path.c_str(), continues ? "ab" : "wb"));
  if (file_ == nullptr) throw Error(fmt::format("cannot write {}: {}", path.string(), std::strerror(errno)));
  if (!continues) std::fwrite(kMagic.data(), 1, kMagic.size(), file_.get());
}

void RoutingRecorder::append(const RoutingKey& key, const at::Tensor& chosen_ids_TK,
                             std::int64_t num_experts) {
  const at::Tensor ids = chosen_ids_TK.cpu().contiguous();
  const Header header = {key.step, key.micro_step, key.layer, ids.size(0), ids.size(1), num_experts};
  std::vector<std::byte> record(sizeof(header) + ids.nbytes());
  std::memcpy(record.data(), header.data(), sizeof(header));
  if (ids.nbytes() > 0) std::memcpy(record.data() + sizeof(header), ids.const_data_ptr(), ids.nbytes());
  const std::uint64_t sum = record_checksum(record.data(), record.size());
  const bool ok = std::fwrite(record.data(), 1, record.size(), file_.get()) == record.size() &&
                  std::fwrite(&sum, sizeof(sum), 1, file_.get()) == 1;
  if (!ok) throw Error(fmt::format("cannot write {}: {}", path_.string(), std::strerror(errno)));
}

void RoutingRecorder::flush() {
  if (std::fflush(file_.get()) != 0) {
    throw Error(fmt::format("cannot write {}: {}", path_.string(), std::strerror(errno)));
  }
}

RoutingReplay::RoutingReplay(const std::filesystem::path& path) : path_(path), file_(path) {
  for (const Entry& entry : read_entries(file_, path))
    records_[entry.key] = {.offset = entry.ids, .sizes = entry.sizes};
}

at::Tensor RoutingReplay::ids_TK(const RoutingKey& key, std::int64_t num_tokens, std::int64_t width,
                                 std::int64_t num_experts) const {
  const auto found = records_.find(key);
  require_config(found != records_.end(), "{}: no routing of step {}, micro-step {}, layer {}",
                 path_.string(), key.step, key.micro_step, key.layer);
  const Record& record = found->second;
  require_config(
      record.sizes == std::array{num_tokens, width, num_experts},
      "{}: step {}, micro-step {}, layer {} holds {} tokens x {} of {} experts, this run needs {} x {} of {}",
      path_.string(), key.step, key.micro_step, key.layer, record.sizes[0], record.sizes[1], record.sizes[2],
      num_tokens, width, num_experts);
  at::Tensor ids_TK = at::empty({num_tokens, width}, at::kInt);
  if (ids_TK.nbytes() > 0)
    std::memcpy(ids_TK.mutable_data_ptr(), file_.bytes().data() + record.offset, ids_TK.nbytes());
  const auto* ids = ids_TK.const_data_ptr<std::int32_t>();
  for (std::int64_t i = 0; i < ids_TK.numel(); ++i) {
    require_config(ids[i] >= -1 && ids[i] < num_experts,
                   "{}: step {}, micro-step {}, layer {}: token {} goes to expert {}, there are {}",
                   path_.string(), key.step, key.micro_step, key.layer, i / width, ids[i], num_experts);
  }
  return ids_TK;
}

}  // namespace collegium::moe
