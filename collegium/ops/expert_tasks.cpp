// SPDX-License-Identifier: Apache-2.0
#include "collegium/ops/expert_tasks.h"

#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <atomic>

#include "collegium/base/error.h"
#include "collegium/ops/product.h"

namespace collegium::ops {

std::vector<ExpertRows> rows_of_experts(const at::Tensor& counts_E) {
  COLLEGIUM_CHECK(counts_E.is_cpu() && counts_E.scalar_type() == at::kLong,
                  "counts must be int64 on the CPU");
  std::vector<ExpertRows> experts;
  experts.reserve(static_cast<std::size_t>(counts_E.numel()));
  const auto* counts = counts_E.const_data_ptr<std::int64_t>();
  std::int64_t begin = 0;
  for (std::int64_t expert = 0; expert < counts_E.numel(); ++expert) {
    experts.push_back({.expert = expert, .begin = begin, .rows = counts[expert]});
    begin += counts[expert];
  }
  return experts;
}

std::int64_t gemm_rows(std::int64_t num_rows, at::ScalarType dtype) {
  constexpr std::int64_t kLeastGemmRows = 256;
  const bool short_products = dtype == at::kBFloat16 && !product_ways().blocks;
  const std::int64_t pieces = short_products ? 64 : 16;
  return std::clamp(num_rows / pieces / kSizeStep * kSizeStep, kLeastGemmRows, kMostGemmRows);
}

std::int64_t rounded_rows(std::int64_t rows) {
  std::int64_t step = kSizeStep;
  while (rows > kSizeStep * step) step *= 2;
  return (rows + step - 1) / step * step;
}

std::vector<ExpertRows> cut_rows(const ExpertRows& expert, std::int64_t most_rows) {
  std::vector<ExpertRows> pieces;
  for (std::int64_t begin = expert.begin; begin < expert.end();) {
    const std::int64_t left = expert.end() - begin;
    const std::int64_t rows = left < 2 * most_rows ? left : most_rows;
    pieces.push_back({.expert = expert.expert, .begin = begin, .rows = rows});
    begin += rows;
  }
  return pieces;
}

std::vector<ExpertRows> cut_rows(const at::Tensor& counts_E, at::ScalarType dtype) {
  const std::int64_t most_rows = gemm_rows(counts_E.sum().item<std::int64_t>(), dtype);
  std::vector<ExpertRows> pieces;
  for (const ExpertRows& expert : rows_of_experts(counts_E)) {
    const auto cut = cut_rows(expert, most_rows);
    pieces.insert(pieces.end(), cut.begin(), cut.end());
  }
  return pieces;
}

std::vector<ExpertRows> gemms_of(const ExpertRows& piece, std::int64_t most_rows, at::ScalarType dtype) {
  std::vector<ExpertRows> gemms;
  const auto add = [&](std::int64_t begin, std::int64_t rows) {
    gemms.push_back({.expert = piece.expert, .begin = begin, .rows = rows});
    return begin + rows;
  };
  if (dtype != at::kBFloat16 || product_ways().blocks) {
    add(piece.begin, piece.rows);
    return gemms;
  }
  std::int64_t begin = piece.begin;
  if (piece.rows > most_rows) begin = add(begin, most_rows);
  const std::int64_t left = piece.end() - begin;
  const std::int64_t rounded = (left + kSizeStep - 1) / kSizeStep * kSizeStep;
  if (rounded <= piece.rows) {
    add(piece.end() - rounded, rounded);
    return gemms;
  }
  if (left > kSizeStep) {
    add(begin, rounded - kSizeStep);
    add(piece.end() - kSizeStep, kSizeStep);
  } else {
    add(begin, left);
  }
  return gemms;
}

void run_tasks(std::int64_t num_tasks, const std::function<void(std::int64_t, std::int64_t)>& task) {
  // Worker threads do not inherit the caller's grad mode, and out= variants refuse weights that require grad.
  if (num_tasks == 1) {
    const at::NoGradGuard no_grad;
    task(0, 0);
    return;
  }
  // A queue rather than equal ranges: tasks differ in rows. Who runs a task does not change its result.
  std::atomic<std::int64_t> next{0};
  at::parallel_for(0, at::get_num_threads(), 1, [&](std::int64_t begin, std::int64_t end) {
    const at::NoGradGuard no_grad;
    for (std::int64_t worker = begin; worker < end; ++worker) {
      for (std::int64_t i = next++; i < num_tasks; i = next++) task(i, worker);
    }
  });
}

}  // namespace collegium::ops
