// SPDX-License-Identifier: Apache-2.0
#include "collegium/ops/gemm_peak.h"

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/ones_like.h>

#include <algorithm>
#include <chrono>

#include "collegium/ops/product.h"

namespace collegium::ops {

double measure_gemm_peak(at::ScalarType dtype) {
  // 1024: large enough to reach the peak, small enough that the three matrices stay in a shared cache.
  constexpr std::int64_t kSize = 1024;
  constexpr double kFlops = 2.0 * kSize * kSize * kSize;
  constexpr double kBudgetSeconds = 0.3;
  const at::NoGradGuard no_grad;
  const at::Tensor a = at::ones({kSize, kSize}, product_dtype(dtype));
  const at::Tensor b = at::ones_like(a);
  at::Tensor c = at::empty_like(a);
  double best = 0.0;
  double spent = 0.0;
  at::mm_out(c, a, b);
  for (int run = 0; run < 3 || spent < kBudgetSeconds; ++run) {
    const auto start = std::chrono::steady_clock::now();
    at::mm_out(c, a, b);
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    spent += seconds;
    best = std::max(best, kFlops / seconds);
  }
  return best;
}

}  // namespace collegium::ops
