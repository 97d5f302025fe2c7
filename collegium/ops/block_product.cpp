// SPDX-License-Identifier: Apache-2.0
#include "collegium/ops/block_product.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <type_traits>

#include "collegium/base/error.h"
#include "collegium/ops/column_block.h"
#include "collegium/ops/round.h"
#include "collegium/ops/thread_buffer.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace collegium::ops {

namespace {

using Bf16 = c10::BFloat16;

#if defined(__SSE2__)
// `to` begins at a line, and columns are whole lines.
template <typename T>
void copy_past_cache(const StridedRows<const T>& from, std::int64_t rows, std::int64_t columns,
                     const StridedRows<T>& to) {
  const std::int64_t vectors =
      columns * static_cast<std::int64_t>(sizeof(T)) / static_cast<std::int64_t>(sizeof(__m128i));
  for (std::int64_t row = 0; row < rows; ++row) {
    const auto* in = reinterpret_cast<const __m128i*>(from.at(row, 0));
    auto* out = reinterpret_cast<__m128i*>(to.at(row, 0));
    for (std::int64_t i = 0; i < vectors; ++i) _mm_stream_si128(out + i, _mm_loadu_si128(in + i));
  }
}
#endif

// Sums as results: rounded once, or as they are.
template <typename T>
class Rounded {
 public:
  explicit Rounded(std::int64_t most_values)
      : values_(std::is_same_v<T, Bf16> ? most_values * static_cast<std::int64_t>(sizeof(T)) : 0) {}
  const T* of(const float* sums, std::int64_t count) {
    if constexpr (std::is_same_v<T, Bf16>) {
      round_values(sums, count, values_.data<Bf16>());
      return values_.data<Bf16>();
    } else {
      return sums;
    }
  }

 private:
  ThreadBuffer values_;
};

template <typename T>
struct Walk {
  const RowSource& a_XI;
  const RowSource& b_IO;
  std::int64_t parts;
  const std::function<void(const BlockRange&)>& before;
  const UseBlock<T>& use;

  // Some rows on this thread.
  template <typename Factor>
  void rows(std::int64_t first, std::int64_t end) const {
    using Block = ColumnBlock<Factor>;
    const std::int64_t depth = a_XI.width();
    const std::int64_t width = b_IO.width() / parts;
    const std::int64_t most = Block::most_columns(depth) / parts;
    const auto a = a_XI.in_place<Factor>();
    Block block(depth, parts * std::min(most, width));
    Rounded<T> rounded(Block::most_rows() * parts * std::min(most, width));
    for (std::int64_t column = 0; column < width; column += most) {
      const std::int64_t columns = std::min(most, width - column);
      block.set_columns(parts * columns);
      for (std::int64_t part = 0; part < parts; ++part)
        block.order(b_IO, part * width + column, columns, part * columns);
      for (std::int64_t row = first; row < end; row += Block::most_rows()) {
        const BlockRange range{.row = row,
                               .rows = std::min(Block::most_rows(), end - row),
                               .column = column,
                               .columns = columns};
        if (before) before(range);
        const float* sums = block.multiply(a.from(row, 0), range.rows);
        use({rounded.of(sums, range.rows * parts * columns), parts * columns}, range);
      }
    }
#if defined(__SSE2__)
    _mm_sfence();  // after what was written past the cache
#endif
  }
};

template <typename T>
void write_product(const RowSource& a_XI, const RowSource& b_IO, const at::Tensor& out_XO, Reuse reuse) {
  const auto out = mutable_rows_of<T>(out_XO);
  product_in_blocks<T>(a_XI, b_IO, 1, {}, [&](const StridedRows<const T>& results, const BlockRange& range) {
    write_block(results, range.rows, range.columns, out.from(range.row, range.column), reuse);
  });
}

}  // namespace

template <typename T>
void write_block(const StridedRows<const T>& results, std::int64_t rows, std::int64_t columns,
                 const StridedRows<T>& to, [[maybe_unused]] Reuse reuse) {
#if defined(__SSE2__)
  constexpr std::int64_t kLineValues = kLineBytes / static_cast<std::int64_t>(sizeof(T));
  const bool in_lines = columns % kLineValues == 0 && to.stride % kLineValues == 0 &&
                        reinterpret_cast<std::uintptr_t>(to.values) % kLineBytes == 0;
  if (reuse == Reuse::kLater && in_lines) return copy_past_cache(results, rows, columns, to);
#endif
  for (std::int64_t row = 0; row < rows; ++row) std::copy_n(results.at(row, 0), columns, to.at(row, 0));
}

bool blocks_take(const RowSource& a_XI, const RowSource& b_IO) {
  const at::Tensor& a = a_XI.values_XD;
  const at::Tensor& b = b_IO.values_XD;
  const bool bf16 = a.scalar_type() == at::kBFloat16;
  if (!a.is_cpu() || !b.is_cpu() || b.scalar_type() != a.scalar_type() ||
      (!bf16 && a.scalar_type() != at::kFloat))
    return false;
  const bool indexed = a_XI.index_R.defined() || b_IO.index_R.defined();
  if (indexed && (bf16 || !ColumnBlock<float>::takes_index())) return false;
  if (b_IO.index_R.defined() && b.stride(1) != 1) return false;
  // Columns of bf16 are read in pairs of values.
  const auto whole_words = [&] {
    const auto first = reinterpret_cast<std::uintptr_t>(b.const_data_ptr());
    return !bf16 || (b.stride(1) % 2 == 0 && first % sizeof(std::uint32_t) == 0);
  };
  const std::int64_t depth = a_XI.width();
  return depth > 0 && (!bf16 || depth % 2 == 0) && a.stride(1) == 1 &&
         (a.size(0) <= 1 || a.stride(0) >= depth) &&
         (b.stride(1) == 1 || (b.stride(0) == 1 && whole_words()));
}

template <typename T>
void product_in_blocks(const RowSource& a_XI, const RowSource& b_IO, std::int64_t parts,
                       const std::function<void(const BlockRange&)>& before, const UseBlock<T>& use) {
  COLLEGIUM_CHECK(blocks_take(a_XI, b_IO), "product_in_blocks: not such factors");
  COLLEGIUM_CHECK(b_IO.rows() == a_XI.width() && b_IO.width() % parts == 0,
                  "product_in_blocks: [{}, {}] x [{}, {}] in {} parts", a_XI.rows(), a_XI.width(),
                  b_IO.rows(), b_IO.width(), parts);
  const std::int64_t num_rows = a_XI.rows();
  const Walk<T> walk{.a_XI = a_XI, .b_IO = b_IO, .parts = parts, .before = before, .use = use};
  with_type_of(a_XI.values_XD, [&]<typename Factor>() {
    const std::int64_t rows = ColumnBlock<Factor>::most_rows();
    at::parallel_for(0, (num_rows + rows - 1) / rows, 1, [&](std::int64_t begin, std::int64_t end) {
      walk.template rows<Factor>(begin * rows, std::min(num_rows, end * rows));
    });
  });
}

void block_product_into(const RowSource& a_XI, const RowSource& b_IO, const at::Tensor& out_XO, Reuse reuse) {
  COLLEGIUM_CHECK(out_XO.size(0) == a_XI.rows() && out_XO.size(1) == b_IO.width(),
                  "block_product_into: [{}, {}] x [{}, {}] -> [{}, {}]", a_XI.rows(), a_XI.width(),
                  b_IO.rows(), b_IO.width(), out_XO.size(0), out_XO.size(1));
  with_type_of(out_XO, [&]<typename T>() { write_product<T>(a_XI, b_IO, out_XO, reuse); });
}

template void write_block(const StridedRows<const float>&, std::int64_t, std::int64_t,
                          const StridedRows<float>&, Reuse);
template void write_block(const StridedRows<const Bf16>&, std::int64_t, std::int64_t,
                          const StridedRows<Bf16>&, Reuse);
template void product_in_blocks<float>(const RowSource&, const RowSource&, std::int64_t,
                                       const std::function<void(const BlockRange&)>&, const UseBlock<float>&);
template void product_in_blocks<Bf16>(const RowSource&, const RowSource&, std::int64_t,
                                      const std::function<void(const BlockRange&)>&, const UseBlock<Bf16>&);

}  // namespace collegium::ops
