// SPDX-License-Identifier: Apache-2.0
#include "collegium/moe/dispatcher.h"
#include "collegium/moe/exchange.h"
#include "collegium/ops/permute.h"

namespace collegium::moe {

namespace {

struct LocalHandle final : DispatchHandle {
  ops::Permutation permutation;
};

// Nothing travels, so every arrow runs where its result is asked for: inputs need not outlive the call, but
// the work is not done before a caller's own work that it put in between.
class LocalDispatcher final : public Dispatcher {
 public:
  explicit LocalDispatcher(std::int64_t num_experts) : num_experts_(num_experts) {}

  std::vector<std::shared_ptr<DispatchHandle>> plan(const DispatchRequest& request) override {
    std::vector<std::shared_ptr<DispatchHandle>> handles;
    for (const at::Tensor& ids_TK : request.chunk_ids_TK) {
      auto handle = std::make_shared<LocalHandle>();
      handle->where = request.where;
      handle->permutation = ops::group_by_expert(ids_TK, num_experts_);
      handle->row_counts_L = handle->permutation.counts_E;
      handles.push_back(std::move(handle));
    }
    return handles;
  }

  Pending<DispatchedRows> dispatch(const at::Tensor& x_TD, const at::Tensor& weights_TK,
                                   const std::shared_ptr<DispatchHandle>& handle) override {
    return Pending<DispatchedRows>([=]() -> DispatchedRows {
      const ops::Permutation& permutation = local(handle);
      return {.rows = {x_TD.contiguous(), permutation.row_token_R},
              .weights_R = rows_of_slots(weights_TK, permutation.row_slot_R)};
    });
  }

  Pending<at::Tensor> combine(const at::Tensor& rows_RD,
                              const std::shared_ptr<DispatchHandle>& handle) override {
    return Pending<at::Tensor>([=] { return ops::combine_rows(rows_RD, local(handle).slot_row_TK); });
  }

  Pending<ops::RowSource> combine_backward(const at::Tensor& grad_y_TD,
                                           const std::shared_ptr<DispatchHandle>& handle) override {
    return Pending<ops::RowSource>(
        [=]() -> ops::RowSource { return {grad_y_TD.contiguous(), local(handle).row_token_R}; });
  }

  Pending<DispatchGradients> dispatch_backward(const at::Tensor& grad_rows_RD,
                                               const at::Tensor& grad_weights_R,
                                               const std::shared_ptr<DispatchHandle>& handle) override {
    return Pending<DispatchGradients>([=]() -> DispatchGradients {
      const ops::Permutation& permutation = local(handle);
      return {.x_TD = grad_rows_RD.defined() ? ops::combine_rows(grad_rows_RD, permutation.slot_row_TK)
                                             : at::Tensor(),
              .weights_TK =
                  slots_of_rows(grad_weights_R, permutation.row_slot_R, permutation.slot_row_TK.sizes())};
    });
  }

 private:
  static const ops::Permutation& local(const std::shared_ptr<DispatchHandle>& handle) {
    return static_cast<const LocalHandle&>(*handle).permutation;
  }

  std::int64_t num_experts_;
};

}  // namespace

std::shared_ptr<Dispatcher> make_local_dispatcher(std::int64_t num_experts) {
  return std::make_shared<LocalDispatcher>(num_experts);
}

}  // namespace collegium::moe
