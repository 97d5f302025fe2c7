// SPDX-License-Identifier: Apache-2.0
#include "collegium/parallel/gradient_sync.h"

#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/variable.h>

#include <array>
#include <limits>
#include <utility>

#include "collegium/base/error.h"

namespace collegium::parallel {

/// A run of neighbouring sums that is reduced in one call.
struct GradientSync::Bucket {
  bool expert = false;
  std::int64_t begin = 0;  ///< elements of dense_ or experts_
  std::int64_t end = 0;
  std::int64_t num_slots = 0;
  std::int64_t missing = 0;  ///< slots whose last gradient has not come
  comm::Work work;
};

class GradientSync::Hook final : public torch::autograd::PostAccumulateGradHook {
 public:
  Hook(std::shared_ptr<GradientSync*> owner, std::size_t slot) : owner_(std::move(owner)), slot_(slot) {}
  void operator()(const torch::autograd::Variable& /*leaf*/) override {
    if (*owner_ != nullptr) (*owner_)->on_gradient(slot_);
  }

 private:
  std::shared_ptr<GradientSync*> owner_;
  std::size_t slot_;
};

GradientSync::GradientSync(const Groups& groups, const ParallelOptions& options,
                           std::vector<GradientSlot> slots, at::Tensor dense, at::Tensor experts)
    : dp_(groups.dp),
      edp_(groups.edp),
      overlap_(options.overlap_gradients && groups.dp->size() > 1),
      slots_(std::move(slots)),
      dense_(std::move(dense)),
      experts_(std::move(experts)),
      bucket_of_(slots_.size()),
      self_(std::make_shared<GradientSync*>(this)) {
  constexpr double kMebibyte = 1048576.0;
  const auto bucket_bytes = overlap_ ? static_cast<std::int64_t>(options.bucket_mib * kMebibyte)
                                     : std::numeric_limits<std::int64_t>::max();
  // The backward pass gives the last parameters first, so buckets are filled from the end.
  std::array<std::int64_t, 2> end = {dense_.numel(), experts_.numel()};
  for (std::size_t i = slots_.size(); i-- > 0;) {
    const GradientSlot& slot = slots_[i];
    const std::size_t kind = slot.expert ? 1 : 0;
    const std::int64_t size = slot.sum.numel();
    const auto is_full = [&](const Bucket& bucket) {
      return (bucket.end - bucket.begin + size) * slot.sum.element_size() > bucket_bytes;
    };
    std::vector<Bucket>& buckets = buckets_[kind];
    if (buckets.empty() || is_full(buckets.back()))
      buckets.push_back({.expert = slot.expert, .begin = end[kind], .end = end[kind], .work = {}});
    Bucket& bucket = buckets.back();
    bucket.begin -= size;
    end[kind] = bucket.begin;
    ++bucket.num_slots;
    bucket_of_[i] = buckets.size() - 1;
    if (overlap_) torch::autograd::impl::set_post_acc_grad_hooks(slot.leaf, std::make_unique<Hook>(self_, i));
  }
}

GradientSync::~GradientSync() { *self_ = nullptr; }

void GradientSync::begin_last_backward() {
  if (!overlap_) return;
  for (std::vector<Bucket>& buckets : buckets_) {
    for (Bucket& bucket : buckets) bucket.missing = bucket.num_slots;
  }
  next_bucket_ = {0, 0};
  armed_ = true;
}

void GradientSync::add_gradient(std::size_t slot) {
  const at::NoGradGuard no_grad;
  at::Tensor& gradient = slots_[slot].leaf.mutable_grad();
  if (!gradient.defined()) return;
  slots_[slot].sum.add_(gradient);
  gradient.reset();
}

void GradientSync::on_gradient(std::size_t slot) {
  if (!armed_) return;
  add_gradient(slot);
  const std::size_t kind = slots_[slot].expert ? 1 : 0;
  std::vector<Bucket>& buckets = buckets_[kind];
  std::size_t& next = next_bucket_[kind];
  --buckets[bucket_of_[slot]].missing;
  while (next < buckets.size() && buckets[next].missing == 0) start(buckets[next++]);
}

void GradientSync::start(Bucket& bucket) {
  comm::Communicator& group = bucket.expert ? *edp_ : *dp_;
  if (group.size() == 1) return;
  const at::Tensor sums =
      (bucket.expert ? experts_ : dense_).narrow(0, bucket.begin, bucket.end - bucket.begin);
  comm::Where where = group.where();
  where.layer = -1;
  where.phase = "gradients";
  const comm::WhereScope scope(group.where(), where);
  bucket.work = group.all_reduce(sums);
}

void GradientSync::finish(std::int64_t step) {
  armed_ = false;
  const comm::WhereScope scope(dp_->where(), {.step = step, .layer = -1, .phase = "gradients"});
  for (std::size_t kind = 0; kind < buckets_.size(); ++kind) {
    for (std::size_t i = next_bucket_[kind]; i < buckets_[kind].size(); ++i) start(buckets_[kind][i]);
  }
  for (std::vector<Bucket>& buckets : buckets_) {
    for (Bucket& bucket : buckets) std::exchange(bucket.work, comm::Work()).wait();
  }
  next_bucket_ = {0, 0};
}

}  // namespace collegium::parallel
