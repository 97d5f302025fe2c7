// SPDX-License-Identifier: Apache-2.0
#include "collegium/train/optimizer_files.h"

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <charconv>
#include <optional>

#include "collegium/base/error.h"
#include "collegium/model/tensor_io.h"

namespace collegium::train {

namespace {

struct Part {
  const char* name;
  at::Tensor optim::Slot::* tensor;
};
constexpr Part kParts[] = {{"master", &optim::Slot::master},
                           {"first_moment", &optim::Slot::first_moment},
                           {"second_moment", &optim::Slot::second_moment}};

bool is_expert(const optim::Slot& slot) { return slot.kind == model::ParameterKind::kExpert; }

struct EntryName {
  std::string tensor;
  std::int64_t first = 0;
  std::int64_t end = -1;  // -1: no range is given
};

// "a/master" or "a/master[2:5]"; nothing for what looks like a range and is none.
std::optional<EntryName> parse_entry(const std::string& entry) {
  const std::size_t bracket = entry.find('[');
  if (bracket == std::string::npos) return EntryName{.tensor = entry};
  EntryName name{.tensor = entry.substr(0, bracket)};
  const char* last = entry.data() + entry.size();
  const auto first = std::from_chars(entry.data() + bracket + 1, last, name.first);
  if (first.ec != std::errc() || first.ptr == last || *first.ptr != ':') return std::nullopt;
  const auto end = std::from_chars(first.ptr + 1, last, name.end);
  const bool closed = end.ec == std::errc() && last - end.ptr == 1 && *end.ptr == ']';
  return closed && name.first >= 0 && name.end >= name.first ? std::optional(name) : std::nullopt;
}

}  // namespace

std::vector<std::pair<std::string, at::Tensor>> optimizer_entries(const optim::MasterWeights& masters,
                                                                  const model::ModelShare& share) {
  std::vector<std::pair<std::string, at::Tensor>> entries;
  for (const optim::Slot& slot : masters.slots()) {
    if (!(is_expert(slot) ? share.experts : share.others)) continue;
    const std::string range =
        is_expert(slot) ? fmt::format("[{}:{}]", slot.first_expert, slot.first_expert + slot.master.size(0))
                        : "";
    for (const Part& part : kParts)
      entries.emplace_back(fmt::format("{}/{}{}", slot.name, part.name, range), slot.*part.tensor);
  }
  return entries;
}

OptimizerFiles::OptimizerFiles(const std::vector<std::filesystem::path>& paths) {
  for (const std::filesystem::path& path : paths) {
    files_.emplace_back(path);
    for (const auto& [entry, info] : files_.back().tensors()) add(files_.size() - 1, entry, info);
  }
}

void OptimizerFiles::add(std::size_t file, const std::string& entry, const TensorInfo& info) {
  const std::optional<EntryName> name = parse_entry(entry);
  const std::int64_t rows = info.shape.empty() ? 0 : info.shape[0];
  require_config(name.has_value() && (name->end < 0 || name->end - name->first == rows),
                 "{}: entry '{}' is not called NAME or NAME[first:end] with end - first = {}, its rows",
                 files_[file].path().string(), entry, rows);
  pieces_[name->tensor].push_back(
      {.file = file, .entry = entry, .first = name->first, .end = name->end < 0 ? rows : name->end});
}

const std::vector<OptimizerFiles::Piece>& OptimizerFiles::pieces_of(const std::string& tensor) const {
  static const std::vector<Piece> none;
  const auto found = pieces_.find(tensor);
  return found == pieces_.end() ? none : found->second;
}

std::string OptimizerFiles::describe(const Piece& piece) const {
  return fmt::format("'{}' of {}", piece.entry, files_[piece.file].path().string());
}

void OptimizerFiles::check_experts(const std::string& tensor, std::int64_t first, std::int64_t end) const {
  const std::vector<Piece>& pieces = pieces_of(tensor);
  for (std::int64_t expert = first; expert < end; ++expert) {
    const auto holds = [&](const Piece& piece) { return piece.first <= expert && expert < piece.end; };
    const auto found = std::find_if(pieces.begin(), pieces.end(), holds);
    require_config(found != pieces.end(), "{}: expert {} is in no optimizer file", tensor, expert);
    const auto again = std::find_if(found + 1, pieces.end(), holds);
    require_config(again == pieces.end(), "{}: expert {} is in {} and in {}", tensor, expert,
                   describe(*found), again == pieces.end() ? "" : describe(*again));
  }
}

void OptimizerFiles::load_tensor(const std::string& tensor, const optim::Slot& slot,
                                 const at::Tensor& target) const {
  const bool expert = is_expert(slot);
  const std::int64_t first = expert ? slot.first_expert : 0;
  const std::int64_t end = first + target.size(0);
  const std::vector<Piece>& pieces = pieces_of(tensor);
  if (expert) {
    check_experts(tensor, first, end);
  } else {
    require_config(pieces.size() == 1, "{}: is in {} optimizer files, must be in one", tensor, pieces.size());
  }
  for (const Piece& piece : pieces) {
    const std::int64_t begin = std::max(first, piece.first);
    const std::int64_t count = std::min(end, piece.end) - begin;
    if (count <= 0) continue;
    const at::Tensor rows = model::read_rows(files_[piece.file], piece.entry, begin - piece.first, count);
    at::Tensor part = target.narrow(0, begin - first, count);
    const bool complete = expert || (piece.first == first && piece.end == end);
    require_config(complete && rows.sizes() == part.sizes() && rows.scalar_type() == part.scalar_type(),
                   "{} has another shape or dtype than the model of this run", describe(piece));
    part.copy_(rows);
  }
}

void OptimizerFiles::load(const optim::Slot& slot) const {
  for (const Part& part : kParts)
    load_tensor(fmt::format("{}/{}", slot.name, part.name), slot, slot.*part.tensor);
}

}  // namespace collegium::train
