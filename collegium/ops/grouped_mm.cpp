// SPDX-License-Identifier: Apache-2.0
#include "collegium/ops/grouped_mm.h"

#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <numeric>
#include <vector>

#include "collegium/base/error.h"

namespace collegium::ops {

namespace {

// Above this many multiply-adds a GEMM fills all threads by itself; below, threads inside it wait for each
// other. Measured on 2 cores (AVX-512 bf16, rows x 512 x 256): 512 rows (2^26) run 1.2 times faster one
// thread per GEMM.
constexpr std::int64_t kSmallGemm = std::int64_t{1} << 28;

using ExpertTask = std::function<void(std::int64_t expert, std::int64_t offset, std::int64_t rows)>;

void for_each_expert(const at::Tensor& counts_E, GemmSchedule schedule, const ExpertTask& task) {
  const std::int64_t num_experts = counts_E.numel();
  const auto* counts = counts_E.const_data_ptr<std::int64_t>();
  std::vector<std::int64_t> offsets(static_cast<std::size_t>(num_experts) + 1, 0);
  std::partial_sum(counts, counts + num_experts, offsets.begin() + 1);
  const auto run = [&](std::int64_t expert) {
    // Worker threads do not inherit the caller's grad mode, and out= variants refuse weights that require
    // grad.
    const at::NoGradGuard no_grad;
    task(expert, offsets[static_cast<std::size_t>(expert)], counts[expert]);
  };
  if (schedule == GemmSchedule::kInside) {
    for (std::int64_t expert = 0; expert < num_experts; ++expert) run(expert);
    return;
  }
  // A queue rather than equal ranges: experts differ in rows. Who computes an expert does not change its
  // result.
  std::atomic<std::int64_t> next{0};
  at::parallel_for(0, at::get_num_threads(), 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t worker = begin; worker < end; ++worker) {
      for (std::int64_t expert = next++; expert < num_experts; expert = next++) run(expert);
    }
  });
}

void check_rows(const at::Tensor& rows, const at::Tensor& counts_E) {
  COLLEGIUM_CHECK(counts_E.is_cpu() && counts_E.scalar_type() == at::kLong,
                  "counts must be int64 on the CPU");
  const std::int64_t total = counts_E.sum().item<std::int64_t>();
  COLLEGIUM_CHECK(rows.dim() == 2 && rows.size(0) == total, "{} rows, counts sum to {}", rows.size(0), total);
}

}  // namespace

GemmSchedule choose_schedule(const at::Tensor& counts_E, std::int64_t in, std::int64_t out,
                             std::int64_t num_threads) {
  const auto* counts = counts_E.const_data_ptr<std::int64_t>();
  std::int64_t used = 0;
  std::int64_t largest = 0;
  std::int64_t total = 0;
  for (std::int64_t expert = 0; expert < counts_E.numel(); ++expert) {
    used += counts[expert] > 0 ? 1 : 0;
    largest = std::max(largest, counts[expert]);
    total += counts[expert];
  }
  const bool enough = num_threads > 1 && used >= 2 * num_threads;
  const bool even = 2 * largest * num_threads <= total;
  const bool small = largest * in * out <= kSmallGemm;
  return enough && even && small ? GemmSchedule::kAcross : GemmSchedule::kInside;
}

at::Tensor grouped_mm(const at::Tensor& x_RI, const at::Tensor& w_EOI, const at::Tensor& counts_E) {
  check_rows(x_RI, counts_E);
  at::Tensor y_RO = at::empty({x_RI.size(0), w_EOI.size(1)}, x_RI.options());
  const auto schedule = choose_schedule(counts_E, w_EOI.size(2), w_EOI.size(1), at::get_num_threads());
  for_each_expert(counts_E, schedule, [&](std::int64_t expert, std::int64_t offset, std::int64_t rows) {
    if (rows == 0) return;
    at::Tensor y = y_RO.narrow(0, offset, rows);
    at::mm_out(y, x_RI.narrow(0, offset, rows), w_EOI.select(0, expert).t());
  });
  return y_RO;
}

at::Tensor grouped_mm_grad_rows(const at::Tensor& grad_RO, const at::Tensor& w_EOI,
                                const at::Tensor& counts_E) {
  check_rows(grad_RO, counts_E);
  at::Tensor grad_RI = at::empty({grad_RO.size(0), w_EOI.size(2)}, grad_RO.options());
  const auto schedule = choose_schedule(counts_E, w_EOI.size(1), w_EOI.size(2), at::get_num_threads());
  for_each_expert(counts_E, schedule, [&](std::int64_t expert, std::int64_t offset, std::int64_t rows) {
    if (rows == 0) return;
    at::Tensor grad = grad_RI.narrow(0, offset, rows);
    at::mm_out(grad, grad_RO.narrow(0, offset, rows), w_EOI.select(0, expert));
  });
  return grad_RI;
}

at::Tensor grouped_mm_grad_weights(const at::Tensor& grad_RO, const at::Tensor& x_RI,
                                   const at::Tensor& counts_E) {
  check_rows(x_RI, counts_E);
  COLLEGIUM_CHECK(grad_RO.size(0) == x_RI.size(0), "{} gradient rows for {} rows", grad_RO.size(0),
                  x_RI.size(0));
  at::Tensor grad_EOI = at::empty({counts_E.numel(), grad_RO.size(1), x_RI.size(1)}, x_RI.options());
  const auto schedule = choose_schedule(counts_E, x_RI.size(1), grad_RO.size(1), at::get_num_threads());
  for_each_expert(counts_E, schedule, [&](std::int64_t expert, std::int64_t offset, std::int64_t rows) {
    at::Tensor grad = grad_EOI.select(0, expert);
    if (rows == 0) {
      grad.zero_();
      return;
    }
    at::mm_out(grad, grad_RO.narrow(0, offset, rows).t(), x_RI.narrow(0, offset, rows));
  });
  return grad_EOI;
}

}  // namespace collegium::ops
