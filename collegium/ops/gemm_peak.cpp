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
#include <functional>

#include "collegium/ops/product.h"

namespace collegium::ops {

namespace {

double seconds_of(const std::function<void()>& run) {
  const auto start = std::chrono::steady_clock::now();
  run();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

double measure_gemm_peak(at::ScalarType dtype) {
  // 1024: large enough to reach the peak, small enough that the three matrices stay in a shared cache.
  constexpr std::int64_t kSize = 1024;
  constexpr double kFlops = 2.0 * kSize * kSize * kSize;
  constexpr double kBudgetSeconds = 0.3;
  const at::NoGradGuard no_grad;
  const at::Tensor a = at::ones({kSize, kSize}, product_dtype(dtype));
  const at::Tensor b = at::ones_like(a);
  at::Tensor c = at::empty_like(a);
  const auto atens = [&] { at::mm_out(c, a, b); };
  const auto own = [&] { product_into(a, b, c); };
  atens();
  own();
  double least = seconds_of(atens);
  double spent = least;
  for (int run = 0; run < 3 || spent < kBudgetSeconds; ++run) {
    const double first = seconds_of(own);
    const double second = seconds_of(atens);
    spent += first + second;
    least = std::min({least, first, second});
  }
  return kFlops / least;
}

}  // namespace collegium::ops
