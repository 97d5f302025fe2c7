// SPDX-License-Identifier: Apache-2.0
#pragma once

// Named axes over the ranks of a run. The dense part of a model uses the axes (pp, dp, cp, tp), the expert
// part (pp, edp, ep, etp): the same ranks, folded twice. Both foldings agree on pp; inside a pipeline stage
// the dp*cp*tp ranks equal the edp*ep*etp ranks, and neither factorisation constrains the other. The last
// axis varies fastest, so tp (etp) neighbours are neighbouring ranks and pp stages lie far apart.

#include <array>
#include <cstddef>
#include <initializer_list>
#include <string>
#include <string_view>
#include <vector>

namespace collegium::mesh {

/// Pipeline, data, context, tensor; expert-data, expert, expert-tensor parallelism.
enum class Axis { kPp, kDp, kCp, kTp, kEdp, kEp, kEtp };

/// What     The name of an axis as users write it: "pp", "dp", "cp", "tp", "edp", "ep", "etp".
std::string_view axis_name(Axis axis);

/// Sizes of the axes; edp is what is left over: dp * cp * tp / (ep * etp).
struct MeshSizes {
  int pp = 1;
  int dp = 1;
  int cp = 1;
  int tp = 1;
  int ep = 1;
  int etp = 1;
};

/// Where a rank stands on every axis, each from 0.
struct Coordinates {
  int pp = 0;
  int dp = 0;
  int cp = 0;
  int tp = 0;
  int edp = 0;
  int ep = 0;
  int etp = 0;

  int operator[](Axis axis) const;  ///< the coordinate on one axis
  bool operator==(const Coordinates&) const = default;
};

/// What     The ranks of a run by name. Immutable and cheap to copy.
/// Order    world_rank = ((pp*DP + dp)*CP + cp)*TP + tp = ((pp*EDP + edp)*EP + ep)*ETP + etp, capitals being
///          sizes.
class Mesh {
 public:
  /// Throws   ConfigError when a size is below 1, or when ep * etp does not divide dp * cp * tp.
  explicit Mesh(const MeshSizes& sizes);

  int size() const { return world_size_; }  ///< ranks of the world: pp * dp * cp * tp
  int size(Axis axis) const;                ///< ranks along one axis

  /// What     Both foldings' coordinates of a rank.
  /// Throws   ConfigError when the rank is not in [0, size()).
  Coordinates coordinates(int world_rank) const;

  /// What     The rank at these coordinates of the dense (pp, dp, cp, tp) or the expert folding
  ///          (pp, edp, ep, etp).
  /// Throws   ConfigError when a coordinate is outside its axis.
  int dense_rank(int pp, int dp, int cp, int tp) const;
  int expert_rank(int pp, int edp, int ep, int etp) const;

  /// What     The ranks that differ from `world_rank` on no axis but those given, in ascending order:
  ///          group({kEp}, r) is r's expert-parallel group, group({kDp, kCp}, r) the ranks over which a
  ///          dense gradient is summed, group({kEdp}, r) those of an expert's. A rank's index in the group
  ///          is its coordinate on the axes, the first axis of the world order being the slowest.
  /// Throws   ConfigError for a set that mixes dense axes (dp, cp, tp) with expert axes (edp, ep, etp).
  std::vector<int> group(std::initializer_list<Axis> axes, int world_rank) const;

  /// What     All distinct groups over these axes, ordered by their first rank.
  std::vector<std::vector<int>> groups(std::initializer_list<Axis> axes) const;

  const MeshSizes& sizes() const { return sizes_; }

 private:
  MeshSizes sizes_;
  int edp_ = 1;
  int world_size_ = 1;
};

}  // namespace collegium::mesh
