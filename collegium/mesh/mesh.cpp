// SPDX-License-Identifier: Apache-2.0
#include "collegium/mesh/mesh.h"

#include <cstdint>
#include <limits>

#include "collegium/base/error.h"

namespace collegium::mesh {

namespace {

constexpr std::array<std::string_view, 7> kAxisNames = {"pp", "dp", "cp", "tp", "edp", "ep", "etp"};
constexpr std::array kDenseOrder = {Axis::kPp, Axis::kDp, Axis::kCp, Axis::kTp};
constexpr std::array kExpertOrder = {Axis::kPp, Axis::kEdp, Axis::kEp, Axis::kEtp};

bool contains(std::initializer_list<Axis> axes, Axis wanted) {
  for (const Axis axis : axes) {
    if (axis == wanted) return true;
  }
  return false;
}

// The folding whose axes are asked for; pp alone belongs to both.
const std::array<Axis, 4>& folding_of(std::initializer_list<Axis> axes) {
  const Axis* dense = nullptr;
  const Axis* expert = nullptr;
  for (const Axis& axis : axes) {
    if (axis == Axis::kPp) continue;
    (axis <= Axis::kTp ? dense : expert) = &axis;
  }
  require_config(
      dense == nullptr || expert == nullptr,
      "group axes {} and {}: a group uses axes of the dense mesh (dp, cp, tp) or of the expert mesh "
      "(edp, ep, etp), not of both",
      dense == nullptr ? "" : axis_name(*dense), expert == nullptr ? "" : axis_name(*expert));
  return expert != nullptr ? kExpertOrder : kDenseOrder;
}

}  // namespace

std::string_view axis_name(Axis axis) { return kAxisNames.at(static_cast<std::size_t>(axis)); }

int Coordinates::operator[](Axis axis) const {
  switch (axis) {
    case Axis::kPp:
      return pp;
    case Axis::kDp:
      return dp;
    case Axis::kCp:
      return cp;
    case Axis::kTp:
      return tp;
    case Axis::kEdp:
      return edp;
    case Axis::kEp:
      return ep;
    case Axis::kEtp:
      return etp;
  }
  throw InternalError("unknown axis");
}

Mesh::Mesh(const MeshSizes& sizes) : sizes_(sizes) {
  const std::array named = {std::pair{"pp", sizes.pp}, std::pair{"dp", sizes.dp},
                            std::pair{"cp", sizes.cp}, std::pair{"tp", sizes.tp},
                            std::pair{"ep", sizes.ep}, std::pair{"etp", sizes.etp}};
  for (const auto& [name, value] : named)
    require_config(value >= 1, "mesh.{} = {}: must be at least 1", name, value);
  constexpr int kMost = std::numeric_limits<int>::max();
  std::int64_t ranks = sizes.pp;
  for (const int factor : {sizes.dp, sizes.cp, sizes.tp}) {
    require_config(ranks <= kMost / factor, "mesh: pp*dp*cp*tp = {}*{}*{}*{} ranks: must be at most {}",
                   sizes.pp, sizes.dp, sizes.cp, sizes.tp, kMost);
    ranks *= factor;
  }
  const std::int64_t stage = ranks / sizes.pp;
  const std::int64_t expert = std::int64_t{sizes.ep} * sizes.etp;
  require_config(stage % expert == 0, "mesh: ep*etp = {}*{} = {} must divide dp*cp*tp = {}*{}*{} = {}",
                 sizes.ep, sizes.etp, expert, sizes.dp, sizes.cp, sizes.tp, stage);
  edp_ = static_cast<int>(stage / expert);
  world_size_ = static_cast<int>(ranks);
}

int Mesh::size(Axis axis) const {
  switch (axis) {
    case Axis::kPp:
      return sizes_.pp;
    case Axis::kDp:
      return sizes_.dp;
    case Axis::kCp:
      return sizes_.cp;
    case Axis::kTp:
      return sizes_.tp;
    case Axis::kEdp:
      return edp_;
    case Axis::kEp:
      return sizes_.ep;
    case Axis::kEtp:
      return sizes_.etp;
  }
  throw InternalError("unknown axis");
}

Coordinates Mesh::coordinates(int world_rank) const {
  require_config(world_rank >= 0 && world_rank < world_size_, "world_rank = {}: must be in [0, {})",
                 world_rank, world_size_);
  const int stage_size = world_size_ / sizes_.pp;
  const int in_stage = world_rank % stage_size;
  return {.pp = world_rank / stage_size,
          .dp = in_stage / (sizes_.cp * sizes_.tp),
          .cp = in_stage / sizes_.tp % sizes_.cp,
          .tp = in_stage % sizes_.tp,
          .edp = in_stage / (sizes_.ep * sizes_.etp),
          .ep = in_stage / sizes_.etp % sizes_.ep,
          .etp = in_stage % sizes_.etp};
}

namespace {

int rank_at(const Mesh& mesh, const std::array<Axis, 4>& order, const std::array<int, 4>& place) {
  int rank = 0;
  for (std::size_t i = 0; i < order.size(); ++i) {
    const int size = mesh.size(order.at(i));
    require_config(place.at(i) >= 0 && place.at(i) < size, "coordinate {} = {}: must be in [0, {})",
                   axis_name(order.at(i)), place.at(i), size);
    rank = rank * size + place.at(i);
  }
  return rank;
}

}  // namespace

int Mesh::dense_rank(int pp, int dp, int cp, int tp) const {
  return rank_at(*this, kDenseOrder, {pp, dp, cp, tp});
}

int Mesh::expert_rank(int pp, int edp, int ep, int etp) const {
  return rank_at(*this, kExpertOrder, {pp, edp, ep, etp});
}

std::vector<int> Mesh::group(std::initializer_list<Axis> axes, int world_rank) const {
  const auto& order = folding_of(axes);
  const Coordinates here = coordinates(world_rank);
  // Mixed-radix walk over the chosen axes: slowest first, so the members come out in ascending order.
  std::vector<int> members = {0};
  for (const Axis axis : order) {
    const bool varies = contains(axes, axis);
    const int first = varies ? 0 : here[axis];
    const int last = varies ? size(axis) : first + 1;
    std::vector<int> next;
    next.reserve(members.size() * static_cast<std::size_t>(last - first));
    for (const int prefix : members) {
      for (int i = first; i < last; ++i) next.push_back(prefix * size(axis) + i);
    }
    members = std::move(next);
  }
  return members;
}

std::vector<std::vector<int>> Mesh::groups(std::initializer_list<Axis> axes) const {
  std::vector<std::vector<int>> all;
  for (int rank = 0; rank < world_size_; ++rank) {
    std::vector<int> members = group(axes, rank);
    if (members.front() == rank) all.push_back(std::move(members));
  }
  return all;
}

}  // namespace collegium::mesh
