// SPDX-License-Identifier: Apache-2.0
#include "collegium/train/snapshot.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "collegium/base/error.h"
#include "collegium/base/rng.h"

namespace collegium::train {

namespace {

// All experts of a parameter of which every rank of an ep group holds some.
at::Tensor with_all_experts(const at::Tensor& held, const parallel::Groups& groups) {
  std::vector<std::int64_t> shape = held.sizes().vec();
  shape[0] = groups.placement.num_experts;
  const at::Tensor all = at::empty(shape, held.options());
  std::vector<std::int64_t> rows;
  rows.reserve(static_cast<std::size_t>(groups.ep->size()));
  for (int rank = 0; rank < groups.ep->size(); ++rank) rows.push_back(groups.placement.count(rank));
  groups.ep->all_gather(held.contiguous(), all, rows).wait();
  return all;
}

at::Tensor whole(const optim::Slot& slot, const at::Tensor& part, const parallel::Groups& groups) {
  return slot.kind == model::ParameterKind::kExpert ? with_all_experts(part, groups) : part.clone();
}

// A hash that is the same on two ranks if, and in practice only if, the bits are.
std::int64_t hash_bits(const at::Tensor& tensor) {
  const at::Tensor values = tensor.contiguous();
  const std::string_view bytes(static_cast<const char*>(values.const_data_ptr()), values.nbytes());
  return static_cast<std::int64_t>(hash_name(bytes) >> 1U);
}

bool agrees(comm::Communicator& group, std::int64_t hash) {
  const at::Tensor range = at::tensor({hash, -hash}, at::kLong);
  group.all_reduce(range, comm::ReduceOp::kMax).wait();
  return range[0].item<std::int64_t>() == -range[1].item<std::int64_t>();
}

// The norm is compared as bits, for it may be NaN.
bool gradients_agree(const Trainer& trainer, double norm) {
  const parallel::Groups& groups = trainer.groups();
  std::int64_t bits = 0;
  std::memcpy(&bits, &norm, sizeof(bits));
  const bool norms = agrees(*groups.world, bits);
  const bool dense = agrees(*groups.dp, hash_bits(trainer.masters().dense_gradients()));
  const bool experts = agrees(*groups.edp, hash_bits(trainer.masters().expert_gradients()));
  return norms && dense && experts;
}

bool weights_agree(const Trainer& trainer) {
  const parallel::Groups& groups = trainer.groups();
  bool same = true;
  for (const optim::Slot& slot : trainer.masters().slots()) {
    const bool expert = slot.kind == model::ParameterKind::kExpert;
    same = agrees(expert ? *groups.edp : *groups.dp, hash_bits(slot.master)) && same;
  }
  return same;
}

void keep_largest(double value, const std::string& name, double& largest, std::string& where) {
  // A NaN is the largest difference of all.
  if (!(value > largest) && !std::isnan(value)) return;
  largest = std::isnan(value) ? std::numeric_limits<double>::infinity() : value;
  where = name;
}

double relative(double a, double b) {
  const double distance = std::abs(a - b);
  return std::abs(b) < 1e-12 ? distance : distance / std::abs(b);
}

void compare_all(const std::map<std::string, at::Tensor>& ours,
                 const std::map<std::string, at::Tensor>& reference, const LeastNorms& least, double& largest,
                 std::string& where) {
  COLLEGIUM_CHECK(ours.size() == reference.size(), "{} tensors and {}", ours.size(), reference.size());
  for (const auto& [name, tensor] : reference) {
    const auto found = least.find(name);
    const double difference =
        norm_difference(ours.at(name), tensor, found == least.end() ? 0.0 : found->second);
    keep_largest(difference, name, largest, where);
  }
}

double norm_of(const at::Tensor& tensor) { return tensor.to(at::kDouble).norm().item<double>(); }

double distance(const at::Tensor& a, const at::Tensor& b) {
  return norm_of(a.to(at::kDouble) - b.to(at::kDouble));
}

}  // namespace

Snapshot take_snapshot(const RunConfig& config, const std::shared_ptr<comm::Communicator>& world,
                       std::int64_t steps, const RoutingFiles& routing) {
  Trainer trainer(config, world);
  if (!routing.record.empty()) trainer.record_routing(routing.record);
  if (!routing.replay.empty()) trainer.replay_routing(routing.replay, steps);
  Snapshot snapshot;
  for (std::int64_t step = 1; step <= steps; ++step) {
    StepReport report = trainer.compute_gradients();
    snapshot.losses.push_back(report.loss + report.balance_loss);
    snapshot.norms.push_back(report.gradient.total);
    for (const optim::Slot& slot : trainer.masters().slots()) {
      snapshot.gradients[fmt::format("step {}: {}", step, slot.name)] =
          whole(slot, slot.gradient, trainer.groups());
    }
    snapshot.ranks_agree = gradients_agree(trainer, report.gradient.total) && snapshot.ranks_agree;
    trainer.update_weights(report);
    snapshot.ranks_agree = weights_agree(trainer) && snapshot.ranks_agree;
  }
  for (const optim::Slot& slot : trainer.masters().slots())
    snapshot.parameters[slot.name] = whole(slot, slot.master, trainer.groups());
  return snapshot;
}

double norm_difference(const at::Tensor& a, const at::Tensor& b, double least) {
  const double scale = std::max(norm_of(b), least);
  return scale < 1e-12 ? distance(a, b) : distance(a, b) / scale;
}

double Difference::largest() const { return std::max({loss, gradient, parameter, norm}); }

Difference compare(const Snapshot& snapshot, const Snapshot& reference) {
  Difference difference;
  std::string ignored;
  for (std::size_t step = 0; step < reference.losses.size(); ++step) {
    keep_largest(relative(snapshot.losses[step], reference.losses[step]), "", difference.loss, ignored);
    keep_largest(relative(snapshot.norms[step], reference.norms[step]), "", difference.norm, ignored);
  }
  compare_all(snapshot.gradients, reference.gradients, reference.least_norms, difference.gradient,
              difference.worst_gradient);
  compare_all(snapshot.parameters, reference.parameters, {}, difference.parameter,
              difference.worst_parameter);
  return difference;
}

LeastNorms least_norms_of(const Snapshot& rounded, const Snapshot& exact, double bound) {
  LeastNorms least;
  for (const auto& [name, gradient] : rounded.gradients)
    least[name] = 4.0 * distance(gradient, exact.gradients.at(name)) / bound;
  return least;
}

bool bit_identical(const Snapshot& a, const Snapshot& b) {
  const auto same = [](const auto& left, const auto& right) {
    return std::equal(left.begin(), left.end(), right.begin(), right.end(),
                      [](const auto& x, const auto& y) { return at::equal(x.second, y.second); });
  };
  return a.losses == b.losses && a.norms == b.norms && same(a.gradients, b.gradients) &&
         same(a.parameters, b.parameters);
}

}  // namespace collegium::train
