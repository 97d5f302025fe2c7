// SPDX-License-Identifier: Apache-2.0
#include "collegium/ops/tile_product.h"

#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty.h>

#include <algorithm>

#include "collegium/base/error.h"
#include "collegium/ops/round.h"
#include "collegium/ops/row_math.h"
#include "collegium/ops/transpose.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace collegium::ops {

namespace {

using Bf16 = c10::BFloat16;

// The sums of a block are 32 KiB and stay in the first cache; the ordered columns in the second. Of {32, 64,
// 128, 256} rows, {32, 64, 96, 128, 192, 256, 512} columns and depths of 512, 1024 and all at a time, these
// were among the best for each of the experts' products, coarse and fine.
constexpr std::int64_t kMostDepth = 1024;
constexpr std::int64_t kDepthStep = 32;  // of an AMX instruction

COLLEGIUM_CLONES void interleave(const std::uint16_t* in, std::int64_t stride, std::int64_t depth,
                                 std::int64_t columns, std::uint32_t* out, std::int64_t out_stride) {
  for (std::int64_t k = 0; k < depth; k += 2, in += 2 * stride, out += out_stride) {
    const std::uint16_t* next = in + stride;
    std::uint32_t* __restrict__ pairs = out;
    for (std::int64_t n = 0; n < columns; ++n)
      pairs[n] = static_cast<std::uint32_t>(in[n]) | static_cast<std::uint32_t>(next[n]) << 16U;
  }
}

#if defined(__x86_64__)
// `to` begins at a line. Every processor with tiles has these instructions.
__attribute__((target("avx512f"))) void copy_past_cache(const StridedRows<const Bf16>& from,
                                                        std::int64_t rows, std::int64_t columns,
                                                        const StridedRows<Bf16>& to) {
  for (std::int64_t row = 0; row < rows; ++row) {
    for (std::int64_t i = 0; i < columns; i += kLineValues)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to.at(row, i)), _mm512_loadu_si512(from.at(row, i)));
  }
}
#endif

// What brgemm() computes.
COLLEGIUM_CLONES void plain_product(const StridedRows<const Bf16>& a, std::int64_t rows, std::int64_t columns,
                                    std::int64_t depth, const Bf16* ordered, float* sums) {
  std::fill_n(sums, rows * columns, 0.0F);
  for (std::int64_t row = 0; row < rows; ++row, sums += columns) {
    for (std::int64_t k = 0; k < depth; ++k) {
      const float left = row_math::widen(*a.at(row, k));
      const Bf16* pairs = ordered + k / 2 * 2 * columns + k % 2;
      for (std::int64_t n = 0; n < columns; ++n) sums[n] += left * row_math::widen(pairs[2 * n]);
    }
  }
}

}  // namespace

bool TileBlock::has_tiles() {
  static const bool found = at::native::cpublas::could_pack(at::kBFloat16);
  return found;
}

TileBlock::TileBlock(std::int64_t depth, std::int64_t columns, bool tiles)
    : depth_(depth),
      columns_(columns),
      tiles_(tiles),
      ordered_(at::empty({depth / 2, columns}, at::kInt)),
      sums_(at::empty({kRows, columns}, at::kFloat)),
      rounded_(at::empty({kRows, columns}, at::kBFloat16)) {
  COLLEGIUM_CHECK(depth > 0 && depth % 2 == 0 && columns <= kColumns, "TileBlock: {} rows, {} columns", depth,
                  columns);
}

TileBlock::~TileBlock() {
  if (tiles_) at::native::cpublas::brgemm_release();
#if defined(__x86_64__)
  if (wrote_past_cache_) _mm_sfence();
#endif
}

void TileBlock::set_columns(std::int64_t columns) {
  COLLEGIUM_CHECK(columns <= sums_.size(1), "{} columns in a block of {}", columns, sums_.size(1));
  columns_ = columns;
}

void TileBlock::order(const at::Tensor& b_KN, std::int64_t first, std::int64_t count, std::int64_t into) {
  COLLEGIUM_CHECK(b_KN.size(0) == depth_ && first + count <= b_KN.size(1) && into + count <= columns_,
                  "{} columns from {} of [{}, {}] for a block [{}, {}] at {}", count, first, b_KN.size(0),
                  b_KN.size(1), depth_, columns_, into);
  const auto* in = static_cast<const std::uint16_t*>(b_KN.const_data_ptr()) + first * b_KN.stride(1);
  auto* out = static_cast<std::uint32_t*>(ordered_.mutable_data_ptr()) + into;
  if (b_KN.stride(1) == 1) {
    interleave(in, b_KN.stride(0), depth_, count, out, columns_);
  } else {
    transpose_pairs(in, b_KN.stride(1), count, depth_, out, columns_);
  }
}

StridedRows<const Bf16> TileBlock::multiply(const StridedRows<const Bf16>& a, std::int64_t rows) {
  COLLEGIUM_CHECK(rows <= kRows, "{} rows in a block of {}", rows, kRows);
  const auto* ordered = static_cast<const Bf16*>(ordered_.const_data_ptr());
  auto* sums = sums_.mutable_data_ptr<float>();
  if (tiles_) {
    const std::int64_t parts = (depth_ + kMostDepth - 1) / kMostDepth;
    const std::int64_t part = (depth_ + parts * kDepthStep - 1) / (parts * kDepthStep) * kDepthStep;
    // A single row's stride may be anything.
    const std::int64_t stride = std::max(a.stride, depth_);
    for (std::int64_t k = 0; k < depth_; k += part) {
      at::native::cpublas::brgemm(rows, columns_, std::min(part, depth_ - k), stride, columns_, columns_,
                                  k > 0, a.at(0, k), ordered + k * columns_, sums);
    }
  } else {
    plain_product(a, rows, columns_, depth_, ordered, sums);
  }
  auto* rounded = rounded_.mutable_data_ptr<Bf16>();
  round_values(sums, rows * columns_, rounded);
  return {rounded, columns_};
}

void TileBlock::write(const StridedRows<const Bf16>& results, std::int64_t rows, std::int64_t columns,
                      const StridedRows<Bf16>& to, [[maybe_unused]] Reuse reuse) {
#if defined(__x86_64__)
  const bool in_lines = columns % kLineValues == 0 && to.stride % kLineValues == 0 &&
                        reinterpret_cast<std::uintptr_t>(to.values) % sizeof(__m512i) == 0;
  if (reuse == Reuse::kLater && in_lines && has_tiles()) {
    wrote_past_cache_ = true;
    return copy_past_cache(results, rows, columns, to);
  }
#endif
  for (std::int64_t row = 0; row < rows; ++row) std::copy_n(results.at(row, 0), columns, to.at(row, 0));
}

bool tiles_take(const at::Tensor& a_MK, const at::Tensor& b_KN) {
  const auto bf16 = [](const at::Tensor& x) { return x.is_cpu() && x.scalar_type() == at::kBFloat16; };
  // Columns are read in pairs of values.
  const auto in_pairs = [](const at::Tensor& b) {
    const auto first = reinterpret_cast<std::uintptr_t>(b.const_data_ptr());
    return b.stride(0) == 1 && b.stride(1) % 2 == 0 && first % sizeof(std::uint32_t) == 0;
  };
  const std::int64_t depth = a_MK.size(1);
  return bf16(a_MK) && bf16(b_KN) && depth > 0 && depth % 2 == 0 && a_MK.stride(1) == 1 &&
         (a_MK.size(0) <= 1 || a_MK.stride(0) >= depth) && (b_KN.stride(1) == 1 || in_pairs(b_KN));
}

void product_in_blocks(
    const at::Tensor& a_MK, const at::Tensor& b_KN, std::int64_t parts,
    const std::function<void(const BlockRange&)>& before,
    const std::function<void(TileBlock& block, const BlockResults& results, const BlockRange&)>& use) {
  COLLEGIUM_CHECK(tiles_take(a_MK, b_KN), "product_in_blocks: not such factors");
  COLLEGIUM_CHECK(b_KN.size(0) == a_MK.size(1) && b_KN.size(1) % parts == 0,
                  "product_in_blocks: [{}, {}] x [{}, {}] in {} parts", a_MK.size(0), a_MK.size(1),
                  b_KN.size(0), b_KN.size(1), parts);
  const std::int64_t rows = a_MK.size(0);
  const std::int64_t width = b_KN.size(1) / parts;
  if (rows == 0) return;
  const std::int64_t most = TileBlock::kColumns / parts;
  const auto a = rows_of<Bf16>(a_MK);
  TileBlock block(a_MK.size(1), parts * std::min(most, width));
  for (std::int64_t column = 0; column < width; column += most) {
    const std::int64_t columns = std::min(most, width - column);
    block.set_columns(parts * columns);
    for (std::int64_t part = 0; part < parts; ++part)
      block.order(b_KN, part * width + column, columns, part * columns);
    for (std::int64_t row = 0; row < rows; row += TileBlock::kRows) {
      const BlockRange range{
          .row = row, .rows = std::min(TileBlock::kRows, rows - row), .column = column, .columns = columns};
      if (before) before(range);
      use(block, block.multiply(a.from(row, 0), range.rows), range);
    }
  }
}

void tile_product_into(const at::Tensor& a_MK, const at::Tensor& b_KN, const at::Tensor& out_MN,
                       Reuse reuse) {
  COLLEGIUM_CHECK(out_MN.size(0) == a_MK.size(0) && out_MN.size(1) == b_KN.size(1),
                  "tile_product_into: [{}, {}] x [{}, {}] -> [{}, {}]", a_MK.size(0), a_MK.size(1),
                  b_KN.size(0), b_KN.size(1), out_MN.size(0), out_MN.size(1));
  const auto out = mutable_rows_of<Bf16>(out_MN);
  product_in_blocks(
      a_MK, b_KN, 1, {}, [&](TileBlock& block, const BlockResults& results, const BlockRange& range) {
        block.write(results, range.rows, range.columns, out.from(range.row, range.column), reuse);
      });
}

}  // namespace collegium::ops
