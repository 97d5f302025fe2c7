// SPDX-License-Identifier: Apache-2.0
#include "collegium/moe/routing_record.h"

#include <ATen/ops/empty.h>
#include <xxhash.h>

#include <cerrno>
#include <cstring>
#include <string_view>
#include <vector>

#include "collegium/base/error.h"

namespace collegium::moe {

namespace {

constexpr std::string_view kMagic = "CLGROUT1";
using Header = std::array<std::int64_t, 6>;

std::uint64_t record_checksum(const std::byte* record, std::size_t size) { return XXH3_64bits(record, size); }

}  // namespace

RoutingRecorder::RoutingRecorder(const std::filesystem::path& path)
    : path_(path), file_(std::fopen(path.c_str(), "wb")) {
  if (file_ == nullptr) throw Error(fmt::format("cannot write {}: {}", path.string(), std::strerror(errno)));
  std::fwrite(kMagic.data(), 1, kMagic.size(), file_.get());
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
  const auto bytes = file_.bytes();
  require_config(
      bytes.size() >= kMagic.size() && std::memcmp(bytes.data(), kMagic.data(), kMagic.size()) == 0,
      "{}: not a routing record (it does not begin with \"{}\")", path.string(), kMagic);
  std::size_t offset = kMagic.size();
  while (bytes.size() - offset >= sizeof(Header)) {
    Header header{};
    std::memcpy(header.data(), bytes.data() + offset, sizeof(header));
    const auto [step, micro_step, layer, num_tokens, top_k, num_experts] = header;
    constexpr std::int64_t kMaxTokens = std::int64_t{1} << 40;
    require_config(num_tokens >= 0 && num_tokens < kMaxTokens && top_k >= 1 && top_k <= num_experts,
                   "{}: corrupt routing record at byte {}: {} tokens, {} of {} experts", path.string(),
                   offset, num_tokens, top_k, num_experts);
    const auto ids_bytes = static_cast<std::size_t>(num_tokens * top_k) * sizeof(std::int32_t);
    const std::size_t end = offset + sizeof(Header) + ids_bytes + sizeof(std::uint64_t);
    if (end > bytes.size()) break;  // torn tail
    std::uint64_t sum = 0;
    std::memcpy(&sum, bytes.data() + end - sizeof(sum), sizeof(sum));
    require_config(sum == record_checksum(bytes.data() + offset, sizeof(Header) + ids_bytes),
                   "{}: corrupt routing record at byte {}: wrong checksum", path.string(), offset);
    records_[{step, micro_step, layer}] = {.offset = offset + sizeof(Header),
                                           .sizes = {num_tokens, top_k, num_experts}};
    offset = end;
  }
}

at::Tensor RoutingReplay::ids_TK(const RoutingKey& key, std::int64_t num_tokens, std::int64_t top_k,
                                 std::int64_t num_experts) const {
  const auto found = records_.find(key);
  require_config(found != records_.end(), "{}: no routing of step {}, micro-step {}, layer {}",
                 path_.string(), key.step, key.micro_step, key.layer);
  const Record& record = found->second;
  require_config(
      record.sizes == std::array{num_tokens, top_k, num_experts},
      "{}: step {}, micro-step {}, layer {} holds {} tokens x {} of {} experts, this run needs {} x {} of {}",
      path_.string(), key.step, key.micro_step, key.layer, record.sizes[0], record.sizes[1], record.sizes[2],
      num_tokens, top_k, num_experts);
  at::Tensor ids = at::empty({num_tokens, top_k}, at::kInt);
  std::memcpy(ids.mutable_data_ptr(), file_.bytes().data() + record.offset, ids.nbytes());
  return ids;
}

}  // namespace collegium::moe
