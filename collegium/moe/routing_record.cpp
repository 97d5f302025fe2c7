// SPDX-License-Identifier: Apache-2.0
#include "collegium/moe/routing_record.h"

#include <ATen/ops/empty.h>

#include <cerrno>
#include <cstring>
#include <vector>

#include "collegium/base/error.h"
#include "collegium/base/file.h"
#include "collegium/base/routing_file.h"

namespace collegium::moe {

namespace {

// Where the records of steps up to `last_step` end.
std::size_t end_of_step(const std::filesystem::path& path, std::int64_t last_step) {
  const MappedFile file(path);
  std::size_t end = kRoutingMagic.size();
  for (const RoutingEntry& entry : read_routing_entries(file.bytes(), path)) {
    if (entry.header.step > last_step) break;
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
  const bool continues = last_step > 0 && is_file(path);
  if (continues) {
    const std::size_t end = end_of_step(path, last_step);
    std::error_code code;
    std::filesystem::resize_file(path, end, code);
    if (code) throw Error(fmt::format("cannot write {}: {}", path.string(), code.message()));
  }
  file_.reset(std::fopen(path.c_str(), continues ? "ab" : "wb"));
  if (file_ == nullptr) throw Error(fmt::format("cannot write {}: {}", path.string(), std::strerror(errno)));
  if (!continues) std::fwrite(kRoutingMagic.data(), 1, kRoutingMagic.size(), file_.get());
}

void RoutingRecorder::append(const RoutingKey& key, const at::Tensor& chosen_ids_TK,
                             std::int64_t num_experts) {
  const at::Tensor ids = chosen_ids_TK.cpu().contiguous();
  const RoutingHeader header = {.step = key.step,
                                .micro_step = key.micro_step,
                                .layer = key.layer,
                                .num_tokens = ids.size(0),
                                .width = ids.size(1),
                                .num_experts = num_experts};
  const std::vector<std::byte> record = routing_record_bytes(
      header, {ids.const_data_ptr<std::int32_t>(), static_cast<std::size_t>(ids.numel())});
  const bool ok = std::fwrite(record.data(), 1, record.size(), file_.get()) == record.size();
  if (!ok) throw Error(fmt::format("cannot write {}: {}", path_.string(), std::strerror(errno)));
}

void RoutingRecorder::flush() {
  if (std::fflush(file_.get()) != 0) {
    throw Error(fmt::format("cannot write {}: {}", path_.string(), std::strerror(errno)));
  }
}

RoutingReplay::RoutingReplay(const std::filesystem::path& path) : path_(path), file_(path) {
  for (const RoutingEntry& entry : read_routing_entries(file_.bytes(), path)) {
    const RoutingHeader& h = entry.header;
    records_[{.step = h.step, .micro_step = h.micro_step, .layer = h.layer}] = {
        .offset = entry.ids, .sizes = {h.num_tokens, h.width, h.num_experts}};
  }
}

void RoutingReplay::require(const RoutingKey& key, std::int64_t num_tokens, std::int64_t width,
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
}

at::Tensor RoutingReplay::ids_TK(const RoutingKey& key, std::int64_t num_tokens, std::int64_t width,
                                 std::int64_t num_experts) const {
  require(key, num_tokens, width, num_experts);
  const Record& record = records_.at(key);
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
