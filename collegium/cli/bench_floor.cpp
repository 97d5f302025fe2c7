// SPDX-License-Identifier: Apache-2.0
#include "collegium/cli/bench_floor.h"

#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/full.h>
#include <ATen/ops/mm.h>

#include <atomic>

#include "collegium/cli/bench.h"
#include "collegium/ops/product.h"

namespace collegium::cli {

namespace {

at::Tensor matrix(std::int64_t rows, std::int64_t columns, at::ScalarType dtype) {
  constexpr double kValue = 0.01;  // sums stay finite in every dtype, far from denormal numbers
  return at::full({rows, columns}, kValue, dtype);
}

// The transpose's shape over the same memory: as fast as a transposed copy would be, without one.
at::Tensor turned(const at::Tensor& m) { return m.view({m.size(1), m.size(0)}); }

}  // namespace

GemmFloor::GemmFloor(std::span<const std::int64_t> row_counts_L, std::int64_t hidden, std::int64_t ffn,
                     at::ScalarType compute_dtype) {
  const at::ScalarType dtype = ops::product_dtype(compute_dtype);
  for (const std::int64_t rows : row_counts_L) {
    if (rows == 0) continue;
    const auto x = matrix(rows, hidden, dtype);
    const auto gate = matrix(rows, ffn, dtype);
    const auto up = matrix(rows, ffn, dtype);
    const auto activation = matrix(rows, ffn, dtype);
    const auto out = matrix(rows, hidden, dtype);
    const auto gate_weight = matrix(hidden, ffn, dtype);
    const auto up_weight = matrix(hidden, ffn, dtype);
    const auto down_weight = matrix(ffn, hidden, dtype);
    const auto grad_out = matrix(rows, hidden, dtype);
    const auto grad_activation = matrix(rows, ffn, dtype);
    const auto grad_gate = matrix(rows, ffn, dtype);
    const auto grad_up = matrix(rows, ffn, dtype);
    experts_.push_back({{{gate, x, gate_weight},
                         {up, x, up_weight},
                         {out, activation, down_weight},
                         {grad_activation, grad_out, turned(down_weight)},
                         {matrix(rows, hidden, dtype), grad_gate, turned(gate_weight)},
                         {matrix(rows, hidden, dtype), grad_up, turned(up_weight)},
                         {matrix(ffn, hidden, dtype), turned(grad_gate), x},
                         {matrix(ffn, hidden, dtype), turned(grad_up), x},
                         {matrix(hidden, ffn, dtype), turned(grad_out), activation}}});
  }
}

double GemmFloor::inside() const {
  const at::NoGradGuard no_grad;
  const auto start = BenchClock::now();
  for (std::size_t product = 0; product < kProducts; ++product) {
    for (const auto& expert : experts_) {
      at::Tensor out = expert[product].out;
      at::mm_out(out, expert[product].a, expert[product].b);
    }
  }
  return seconds_since(start);
}

double GemmFloor::across() const {
  const auto start = BenchClock::now();
  std::atomic<std::size_t> next{0};
  at::parallel_for(0, at::get_num_threads(), 1, [&](std::int64_t begin, std::int64_t end) {
    const at::NoGradGuard no_grad;  // worker threads do not inherit it
    for (std::int64_t worker = begin; worker < end; ++worker) {
      for (std::size_t expert = next++; expert < experts_.size(); expert = next++) {
        for (const Product& product : experts_[expert]) {
          at::Tensor out = product.out;
          at::mm_out(out, product.a, product.b);
        }
      }
    }
  });
  return seconds_since(start);
}

}  // namespace collegium::cli
