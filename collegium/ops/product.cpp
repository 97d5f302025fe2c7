// SPDX-License-Identifier: Apache-2.0
#include "collegium/ops/product.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <atomic>

#include "collegium/ops/column_block.h"
#include "collegium/ops/cpu_features.h"
#include "collegium/ops/expert_tasks.h"

namespace collegium::ops {

namespace {

ProductWays found_ways() {
  const bool x86 = cpu_has("sse2");
  const bool widen = x86 && !cpu_has("avx512_bf16") && !cpu_has("amx_bf16");
  return {.widen_bf16 = widen, .blocks = cpu_has("avx2") && (widen || has_block_kernel<c10::BFloat16>())};
}

std::atomic<ProductWays>& chosen() {
  static std::atomic<ProductWays> ways{found_ways()};
  return ways;
}

// Calls multiply(tile of a, tile of b, tile of out) on all threads. There are several tiles per core, which
// another may take when one is held up.
template <typename Multiply>
void by_tiles(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out, std::int64_t tile_rows,
              std::int64_t tile_columns, const Multiply& multiply) {
  const std::int64_t across = (b.size(1) + tile_columns - 1) / tile_columns;
  const std::int64_t down = (a.size(0) + tile_rows - 1) / tile_rows;
  run_tasks(down * across, [&](std::int64_t i, std::int64_t) {
    const std::int64_t row = i / across * tile_rows;
    const std::int64_t column = i % across * tile_columns;
    const std::int64_t rows = std::min(tile_rows, a.size(0) - row);
    const std::int64_t columns = std::min(tile_columns, b.size(1) - column);
    multiply(a.narrow(0, row, rows), b.narrow(1, column, columns),
             out.narrow(0, row, rows).narrow(1, column, columns));
  });
}

// Products in panels. On two cores 1.04 to 1.17 times as fast as a whole product of ATen's, [4096, 512 to
// 3072] x [.., 512] and [1024, 512] x [512, 8192], which gives cores equal shares although they are not
// equally fast: alone on a core, both take the same time. [1024, 8192] x [8192, 512], whose rows lie far
// apart: 0.9 times.
bool multiplies_in_tiles(const at::Tensor& a, const at::Tensor& b) {
  constexpr std::int64_t kFewestRows = 96;
  constexpr std::int64_t kDeepest = 4096;
  return products_take_index(a) && multiplies_in_blocks(a, b) && a.size(0) >= kFewestRows &&
         a.size(1) <= kDeepest;
}

// Tiles of {128, 256, 512} rows and {256, 512} columns took about as long; results are the same for any.
at::Tensor tiled_product(const at::Tensor& a, const at::Tensor& b) {
  constexpr std::int64_t kTileColumns = 256;
  constexpr std::int64_t kTilesPerThread = 4;
  const std::int64_t step = ColumnBlock<float>::most_rows();
  const std::int64_t across = (b.size(1) + kTileColumns - 1) / kTileColumns;
  const std::int64_t rows = a.size(0) * across / (kTilesPerThread * at::get_num_threads());
  at::Tensor out = at::empty({a.size(0), b.size(1)}, a.options());
  by_tiles(a, b, out, std::clamp(rows / step, std::int64_t{2}, std::int64_t{10}) * step, kTileColumns,
           [](const at::Tensor& left, const at::Tensor& right, const at::Tensor& to) {
             block_product_into(left, right, to, Reuse::kSoon);
           });
  return out;
}

void multiply_into(const RowSource& a, const RowSource& b, const at::Tensor& out, Reuse reuse) {
  if (multiplies_in_blocks(a, b) && out.stride(1) == 1) {
    block_product_into(a, b, out, reuse);
  } else if (a.values_XD.scalar_type() == out.scalar_type()) {
    at::Tensor target = out;
    at::mm_out(target, a.tensor(), b.tensor());
  } else {
    out.copy_(at::mm(a.tensor(), b.tensor()));
  }
}

}  // namespace

ProductWays product_ways() { return chosen(); }

void assume_product_ways(std::optional<ProductWays> ways) { chosen() = ways ? *ways : found_ways(); }

at::ScalarType product_dtype(at::ScalarType dtype) {
  return dtype == at::kBFloat16 && product_ways().widen_bf16 ? at::kFloat : dtype;
}

at::ScalarType product_dtype(const at::Tensor& operand) {
  return operand.is_cpu() ? product_dtype(operand.scalar_type()) : operand.scalar_type();
}

bool products_take_index(const at::Tensor& values) {
  return product_ways().blocks && values.is_cpu() && values.scalar_type() == at::kFloat &&
         ColumnBlock<float>::takes_index();
}

bool products_are_own(const at::Tensor& values) {
  return product_dtype(values) != values.scalar_type() || products_take_index(values);
}

bool multiplies_in_blocks(const RowSource& a, const RowSource& b) {
  const ProductWays ways = product_ways();
  const bool bf16 = a.values_XD.scalar_type() == at::kBFloat16;
  // A single row of fp32 does not pay for putting the other factor in order: half as fast with AVX-512. In
  // bf16 it was up to three times as fast as a whole product.
  const bool takes_longer = a.rows() == 1 && !bf16;
  return ways.blocks && !(bf16 && ways.widen_bf16) && !takes_longer && blocks_take(a, b);
}

void product_into(const RowSource& a, const RowSource& b, const at::Tensor& out, Reuse reuse) {
  if (product_dtype(out) != out.scalar_type()) return widened_product_into(a, b, out, reuse);
  multiply_into(a, b, out, reuse);
}

void widened_product_into(const RowSource& a, const RowSource& b, const at::Tensor& out, Reuse reuse) {
  constexpr std::int64_t kLeastColumns = 64;
  const at::Tensor wide_a = a.tensor().to(at::kFloat);
  const std::int64_t columns = b.width();
  const std::int64_t most =
      std::max(kLeastColumns, b.rows() * columns > kMostWidened ? kMostWidened / b.rows() : columns);
  for (std::int64_t first = 0; first < columns; first += most) {
    const std::int64_t count = std::min(most, columns - first);
    multiply_into(wide_a, b.some_columns(first, count).tensor().to(at::kFloat), out.narrow(1, first, count),
                  reuse);
  }
}

at::Tensor product(const at::Tensor& a, const at::Tensor& b) {
  // A few rows, such as a token that is generated, do not pay for widening a whole matrix.
  constexpr std::int64_t kFewRows = 8;
  if (product_dtype(a) != a.scalar_type() && (a.size(0) >= kFewRows || b.scalar_type() != a.scalar_type()))
    return widened_product(a, b);
  return multiplies_in_tiles(a, b) ? tiled_product(a, b) : at::mm(a, b);
}

at::Tensor widened_product(const at::Tensor& a, const at::Tensor& b) {
  constexpr std::int64_t kTileRows = 128;
  constexpr std::int64_t kTileColumns = 512;
  at::Tensor out = at::empty({a.size(0), b.size(1)}, a.options());
  by_tiles(a, b.to(at::kFloat), out, kTileRows, kTileColumns,
           [](const at::Tensor& left, const at::Tensor& right, const at::Tensor& to) {
             widened_product_into(left, right, to);
           });
  return out;
}

}  // namespace collegium::ops
