// SPDX-License-Identifier: Apache-2.0
#include <ATen/ops/index_select.h>
#include <ATen/ops/zeros.h>

#include "collegium/moe/dispatcher.h"
#include "collegium/ops/permute.h"

namespace collegium::moe {

namespace {

struct LocalHandle final : DispatchHandle {
  ops::Permutation permutation;
};

class LocalDispatcher final : public Dispatcher {
 public:
  explicit LocalDispatcher(std::int64_t num_experts) : num_experts_(num_experts) {}

  Dispatched dispatch(const at::Tensor& x_TD, const Routing& routing) override {
    auto handle = std::make_shared<LocalHandle>();
    handle->permutation = ops::group_by_expert(routing.expert_ids_TK, num_experts_);
    handle->row_counts_L = handle->permutation.counts_E;
    const at::Tensor slots_R = handle->permutation.row_slot_R.to(at::kLong);
    return {.rows_RD = ops::gather_rows(x_TD, handle->permutation.row_token_R),
            .weights_R = routing.weights_TK.reshape({-1}).index_select(0, slots_R),
            .handle = handle};
  }

  at::Tensor combine(const at::Tensor& rows_RD, const DispatchHandle& handle) override {
    return ops::combine_rows(rows_RD, local(handle).slot_row_TK);
  }

  at::Tensor combine_backward(const at::Tensor& grad_y_TD, const DispatchHandle& handle) override {
    return ops::gather_rows(grad_y_TD, local(handle).row_token_R);
  }

  DispatchGradients dispatch_backward(const at::Tensor& grad_rows_RD, const at::Tensor& grad_weights_R,
                                      const DispatchHandle& handle) override {
    const ops::Permutation& permutation = local(handle);
    at::Tensor grad_weights_TK = at::zeros(permutation.slot_row_TK.sizes(), grad_weights_R.options());
    // Every slot has at most one row, so this writes each element once.
    grad_weights_TK.view({-1}).index_copy_(0, permutation.row_slot_R.to(at::kLong), grad_weights_R);
    return {.x_TD = grad_rows_RD.defined() ? ops::combine_rows(grad_rows_RD, permutation.slot_row_TK)
                                           : at::Tensor(),
            .weights_TK = grad_weights_TK};
  }

 private:
  static const ops::Permutation& local(const DispatchHandle& handle) {
    return static_cast<const LocalHandle&>(handle).permutation;
  }

  std::int64_t num_experts_;
};

}  // namespace

std::shared_ptr<Dispatcher> make_local_dispatcher(std::int64_t num_experts) {
  return std::make_shared<LocalDispatcher>(num_experts);
}

}  // namespace collegium::moe
