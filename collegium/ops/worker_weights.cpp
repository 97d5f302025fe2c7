// SPDX-License-Identifier: Apache-2.0
#include "collegium/ops/worker_weights.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include "collegium/ops/product.h"

namespace collegium::ops {

WorkerWeights::WorkerWeights(const at::Tensor& weights_EXY) : weights_EXY_(weights_EXY) {
  const at::ScalarType wide = product_dtype(weights_EXY);
  const bool large = weights_EXY.size(1) * weights_EXY.size(2) > kMostWidened;
  if (wide == weights_EXY.scalar_type() || large) return;
  const std::int64_t workers = at::get_num_threads();
  copies_ = at::empty({workers, weights_EXY.size(1), weights_EXY.size(2)}, weights_EXY.options().dtype(wide));
  held_.assign(static_cast<std::size_t>(workers), -1);
}

at::Tensor WorkerWeights::of(std::int64_t expert, std::int64_t worker) {
  if (!copies_.defined()) return weights_EXY_.select(0, expert);
  const at::Tensor copy = copies_.select(0, worker);
  std::int64_t& held = held_.at(static_cast<std::size_t>(worker));
  if (held != expert) copy.copy_(weights_EXY_.select(0, expert));
  held = expert;
  return copy;
}

}  // namespace collegium::ops
