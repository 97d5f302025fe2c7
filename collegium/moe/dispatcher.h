// SPDX-License-Identifier: Apache-2.0
#pragma once

// A dispatcher brings rows to the ranks and places where their experts compute, and results back. It owns
// permutation and communication. The gradient of dispatch is combine and the reverse, with the same handle.

#include <ATen/core/Tensor.h>

#include <memory>

#include "collegium/moe/routing.h"

namespace collegium::moe {

/// What one dispatch knows and combine, and both backward passes, need again. Each dispatcher derives its
/// own.
struct DispatchHandle {
  virtual ~DispatchHandle() = default;
  at::Tensor row_counts_L;  ///< int64 on the CPU: rows per local expert, in row order
};

struct Dispatched {
  at::Tensor
      rows_RD;  ///< compute dtype, grouped by local expert, in (source rank, token, slot) order within one
  at::Tensor weights_R;  ///< router dtype, the weight that travels with its row
  std::shared_ptr<DispatchHandle> handle;
};

class Dispatcher {
 public:
  virtual ~Dispatcher() = default;

  /// x_TD -> rows of this rank's experts.
  virtual Dispatched dispatch(const at::Tensor& x_TD, const Routing& routing) = 0;
  /// Rows -> y_TD, a plain sum per token in slot order (fp32 or wider); a token without rows gets zero.
  virtual at::Tensor combine(const at::Tensor& rows_RD, const DispatchHandle& handle) = 0;
  /// Gradient of combine: the rows' gradients from the tokens'.
  virtual at::Tensor combine_backward(const at::Tensor& grad_y_TD, const DispatchHandle& handle) = 0;
  struct DispatchGradients {
    at::Tensor x_TD;
    at::Tensor weights_TK;  ///< router dtype; zero at slots without a row
  };
  /// Gradient of dispatch: tokens' gradients and their weights' from the rows'.
  virtual DispatchGradients dispatch_backward(const at::Tensor& grad_rows_RD,
                                              const at::Tensor& grad_weights_R,
                                              const DispatchHandle& handle) = 0;
};

/// What     The dispatcher of one rank that holds every expert: two row gathers, no communication.
std::shared_ptr<Dispatcher> make_local_dispatcher(std::int64_t num_experts);

}  // namespace collegium::moe
