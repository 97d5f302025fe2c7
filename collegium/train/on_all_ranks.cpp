// SPDX-License-Identifier: Apache-2.0
#include "collegium/train/on_all_ranks.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>

#include <cstring>
#include <exception>
#include <string>

namespace collegium::train {

namespace {

at::Tensor bytes_of(const std::string& text) {
  at::Tensor bytes = at::empty({static_cast<std::int64_t>(text.size())}, at::kByte);
  if (!text.empty()) std::memcpy(bytes.mutable_data_ptr(), text.data(), text.size());
  return bytes;
}

std::vector<std::string> gather_texts(comm::Communicator& world, const std::string& text) {
  const at::Tensor own = bytes_of(text);
  const at::Tensor sizes = at::empty({world.size()}, at::kLong);
  world.all_gather(at::full({1}, own.numel(), at::kLong), sizes).wait();
  const std::vector<std::int64_t> rows(sizes.const_data_ptr<std::int64_t>(),
                                       sizes.const_data_ptr<std::int64_t>() + sizes.numel());
  const at::Tensor all = at::empty({sizes.sum().item<std::int64_t>()}, at::kByte);
  world.all_gather(own, all, rows).wait();
  std::vector<std::string> texts;
  const auto* next = static_cast<const char*>(all.const_data_ptr());
  for (const std::int64_t size : rows) {
    texts.emplace_back(next, static_cast<std::size_t>(size));
    next += size;
  }
  return texts;
}

}  // namespace

std::vector<Json> on_all_ranks(comm::Communicator& world, const std::function<Json()>& part) {
  Json own = Json::object();
  std::exception_ptr failure;
  try {
    own["result"] = part();
  } catch (const std::exception& error) {
    failure = std::current_exception();
    own["error"] = error.what();
  }
  // Paths, which errors quote, need not be UTF-8.
  const std::string text = own.dump(-1, ' ', false, Json::error_handler_t::replace);
  std::vector<Json> results;
  std::string first_error;
  for (const std::string& answer : gather_texts(world, text)) {
    const Json json = Json::parse(answer);
    if (json.contains("error") && first_error.empty())
      first_error = fmt::format("rank {}: {}", results.size(), json["error"].get<std::string>());
    results.push_back(json.value("result", Json()));
  }
  if (failure) std::rethrow_exception(failure);
  if (!first_error.empty()) throw comm::PeerFailure(first_error);
  return results;
}

void require_same_on_all_ranks(
    comm::Communicator& world, const Json& own,
    const std::function<std::string(std::size_t rank, const Json& theirs, const Json& first)>& explain) {
  const std::vector<Json> all = on_all_ranks(world, [&] { return own; });
  for (std::size_t rank = 1; rank < all.size(); ++rank) {
    if (all[rank] != all[0]) throw ConfigError(explain(rank, all[rank], all[0]));
  }
}

}  // namespace collegium::train
