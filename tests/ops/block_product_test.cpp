// SPDX-License-Identifier: Apache-2.0

// Products block by block and what is fused with them: against double precision, and bit for bit against the
// same steps one after the other. Where ATen has no block kernel fp32 runs by panels, bf16 by plain loops.

#include "collegium/ops/block_product.h"

#include <ATen/Parallel.h>
#include <ATen/ops/all.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <gtest/gtest.h>

#include <bit>
#include <functional>
#include <limits>
#include <thread>

#include "collegium/base/error.h"
#include "collegium/ops/column_block.h"
#include "collegium/ops/panel_product.h"
#include "collegium/ops/round.h"
#include "tests/support/products.h"
#include "tests/support/tensors.h"

namespace collegium {
namespace {

using test::expect_product;
using test::random_tensor;

constexpr auto kBf16 = at::kBFloat16;
constexpr auto kSoon = ops::Reuse::kSoon;
constexpr auto kLater = ops::Reuse::kLater;

// Of factors and of results.
class BlockProduct : public testing::TestWithParam<std::pair<at::ScalarType, at::ScalarType>> {
 protected:
  at::ScalarType factors_ = GetParam().first;
  at::ScalarType results_ = GetParam().second;

  // What lies beside the rows is not a number.
  at::Tensor between_nan(std::int64_t rows, std::int64_t depth) const {
    const at::Tensor all = at::full({rows, depth + 4}, std::numeric_limits<float>::quiet_NaN(), factors_);
    return all.narrow(1, 2, depth).copy_(random_tensor("a", {rows, depth}, factors_));
  }
  at::Tensor empty(std::int64_t rows, std::int64_t columns) const {
    return at::empty({rows, columns}, results_);
  }

  // What lies beside the result must stay.
  void expect_product_beside(const at::Tensor& a, const at::Tensor& b, std::int64_t left,
                             std::int64_t stride) const {
    const std::int64_t columns = b.size(1);
    const at::Tensor all = at::full({a.size(0) + 2, stride}, 7.0, results_);
    const at::Tensor out = all.narrow(0, 1, a.size(0)).narrow(1, left, columns);
    ops::block_product_into(a, b, out, kLater);
    expect_product(out, a, b);
    const at::Tensor plain = empty(a.size(0), columns);
    ops::block_product_into(a, b.t().contiguous().t(), plain, kSoon);
    EXPECT_TRUE(at::equal(plain, out));
    out.fill_(7.0);
    EXPECT_TRUE(at::all(all == 7.0).item<bool>()) << "something was written beside the result";
  }
};
INSTANTIATE_TEST_SUITE_P(Dtypes, BlockProduct,
                         testing::Values(std::pair{kBf16, kBf16}, std::pair{kBf16, at::kFloat},
                                         std::pair{at::kFloat, at::kFloat}, std::pair{at::kFloat, kBf16}));

// Columns around a block's, depths around an instruction's and a part's, rows around a block's.
TEST_P(BlockProduct, equals_double_precision_for_every_size) {
  for (const std::int64_t depth : {1, 2, 30, 32, 33, 34, 1022, 1026, 2050}) {
    if (factors_ == kBf16 && depth % 2 == 1) continue;
    for (const std::int64_t columns : {1, 15, 16, 255, 256, 257, 530}) {
      for (const std::int64_t rows : {1, 31, 32, 70}) {
        SCOPED_TRACE(testing::Message() << rows << " x " << depth << " x " << columns);
        const at::Tensor b = random_tensor("b", {depth, columns}, factors_);
        expect_product_beside(between_nan(rows, depth), b, 2, columns + 3);
      }
    }
  }
}

TEST_P(BlockProduct, results_may_be_written_past_the_cache) {
  for (const std::int64_t columns : {32, 256, 320}) {
    for (const std::int64_t rows : {1, 33}) {
      const at::Tensor b = random_tensor("b", {64, columns}, factors_);
      expect_product_beside(between_nan(rows, 64), b, 32, columns + 64);
    }
  }
}

TEST_P(BlockProduct, nothing_one_and_repeated_rows) {
  const at::Tensor b = random_tensor("b", {6, 5}, factors_);
  const at::Tensor column = random_tensor("a", {6, 1}, factors_);
  const at::Tensor row = empty(1, 5);
  ASSERT_TRUE(ops::blocks_take(column.t(), b));
  ops::block_product_into(column.t(), b, row, kSoon);
  expect_product(row, column.t(), b);
  EXPECT_FALSE(ops::blocks_take(column.t().expand({3, 6}), b)) << "rows that overlap";
  const at::Tensor one = empty(4, 1);
  const at::Tensor a = random_tensor("rows", {4, 6}, factors_);
  ops::block_product_into(a, column, one, kLater);
  expect_product(one, a, column);
  ops::block_product_into(a.narrow(0, 0, 0), b, empty(0, 5), kLater);
  ops::block_product_into(a, b.narrow(1, 0, 0), empty(4, 0), kLater);
}

TEST_P(BlockProduct, a_row_depends_on_that_row_alone_and_threads_change_nothing) {
  const at::Tensor a = random_tensor("a", {67, 96}, factors_);
  const at::Tensor b = random_tensor("b", {96, 300}, factors_);
  const at::Tensor all = empty(67, 300);
  ops::block_product_into(a, b, all, kSoon);
  for (const auto& [first, count] : {std::pair{0, 1}, {1, 40}, {35, 32}, {66, 1}}) {
    const at::Tensor some = empty(count, 300);
    ops::block_product_into(a.narrow(0, first, count), b, some, kSoon);
    EXPECT_TRUE(at::equal(some, all.narrow(0, first, count)));
  }
  const int threads = at::get_num_threads();
  for (const int count : {1, 2, 3, 7}) {
    at::set_num_threads(count);
    const at::Tensor again = empty(67, 300);
    ops::block_product_into(a, b, again, kLater);
    EXPECT_TRUE(at::equal(again, all)) << count << " threads";
  }
  at::set_num_threads(threads);
}

template <typename T>
void expect_blocks_of_two_parts(const at::ScalarType dtype,
                                const std::function<at::Tensor(int, int)>& rows_of) {
  for (const bool kernel : {false, ops::has_block_kernel<T>()}) {
    for (const auto& [depth, columns] : {std::pair{2, 1}, {96, 256}, {1500, 40}}) {
      for (const int rows : {1, static_cast<int>(ops::ColumnBlock<T>::most_rows(kernel))}) {
        const at::Tensor a = rows_of(rows, depth);
        const at::Tensor b = random_tensor("b", {depth, columns + 5}, dtype);
        ops::ColumnBlock<T> block(depth, columns, kernel);
        // The part to the right comes first.
        const std::int64_t left = columns / 2;
        block.order(b, 3, columns - left, left);
        block.order(b, 3 + columns - left, left, 0);
        const float* sums = block.multiply(ops::rows_of<T>(a), rows);
        const at::Tensor copy = at::empty({rows, columns}, at::kFloat);
        std::copy_n(sums, copy.numel(), copy.mutable_data_ptr<float>());
        const at::Tensor right = b.narrow(1, 3, columns - left);
        expect_product(copy, a, at::cat({b.narrow(1, 3 + columns - left, left), right}, 1));
      }
    }
  }
}

TEST_P(BlockProduct, a_block_of_two_parts_by_each_kernel) {
  const auto rows_of = [this](int rows, int depth) { return between_nan(rows, depth); };
  if (factors_ == kBf16) {
    expect_blocks_of_two_parts<c10::BFloat16>(factors_, rows_of);
  } else {
    expect_blocks_of_two_parts<float>(factors_, rows_of);
  }
}

// Bit by bit: rows of both factors where they lie against gathered ones, columns of whole panels and others.
TEST(ColumnBlock, panels_take_rows_by_an_index) {
  constexpr bool kKernel = false;
  for (const auto& [depth, columns] : {std::pair{1, 1}, {33, 40}, {700, 128}}) {
    const at::Tensor a = random_tensor("a", {60, depth}, at::kFloat);
    const at::Tensor b = random_tensor("b", {depth, columns + 3}, at::kFloat);
    const at::Tensor a_index = at::arange(48, at::kInt).mul(7).remainder(20).to(at::kInt);
    const at::Tensor b_index = at::arange(depth - 1, -1, -1, at::kInt);
    const auto sums_of = [&](const ops::RowSource& left, const ops::RowSource& right) {
      ops::ColumnBlock<float> block(depth, columns, kKernel);
      block.order(right, 2, columns, 0);
      const at::Tensor sums = at::empty({left.rows(), columns}, at::kFloat);
      std::copy_n(block.multiply(left.in_place<float>(), left.rows()), sums.numel(),
                  sums.mutable_data_ptr<float>());
      return sums;
    };
    const ops::RowSource left{a, a_index};
    const ops::RowSource right{b, b_index};
    for (const auto& [first, rows] : {std::pair{0, 48}, {0, 1}, {1, 2}, {2, 3}, {3, 4}, {4, 5}, {40, 8}}) {
      const ops::RowSource some = left.some_rows(first, rows);
      EXPECT_TRUE(at::equal(sums_of(some, right), sums_of(some.tensor(), right.tensor())));
    }
  }
  EXPECT_TRUE(ops::ColumnBlock<float>::takes_index(kKernel));
  EXPECT_FALSE(ops::ColumnBlock<c10::BFloat16>::takes_index(kKernel));
  const at::Tensor pair = at::ones({1, 2}, kBf16);
  const at::Tensor first = at::zeros({1}, at::kInt);
  ops::ColumnBlock<c10::BFloat16> block(2, 1, kKernel);
  EXPECT_THROW(block.multiply(ops::RowSource(pair, first).in_place<c10::BFloat16>(), 1), InternalError);
}

TEST_P(BlockProduct, not_a_number_and_infinity_stay) {
  test::expect_not_a_number_and_infinity_stay(
      [this](const at::Tensor& a, const at::Tensor& b, const at::Tensor& out) {
        const at::Tensor results = empty(out.size(0), out.size(1));
        ops::block_product_into(a.to(factors_), b.to(factors_), results, kSoon);
        out.copy_(results);
      });
}

TEST_P(BlockProduct, refuses_what_it_cannot_multiply) {
  const at::Tensor a = at::ones({3, 4}, factors_);
  const at::Tensor b = at::ones({4, 2}, factors_);
  EXPECT_TRUE(ops::blocks_take(a, b));
  EXPECT_TRUE(ops::blocks_take(a, at::ones({2, 4}, factors_).t()));
  const at::Tensor wider = at::ones({2, 6}, factors_);
  EXPECT_TRUE(ops::blocks_take(a, wider.narrow(1, 2, 4).t()));
  EXPECT_FALSE(ops::blocks_take(a.to(at::kDouble), b.to(at::kDouble)));
  EXPECT_FALSE(ops::blocks_take(a, b.to(at::kDouble)));
  EXPECT_FALSE(ops::blocks_take(a.narrow(1, 0, 0), b.narrow(0, 0, 0)));
  EXPECT_FALSE(ops::blocks_take(at::ones({4, 4}, factors_).t(), b));
  const bool any_depth = factors_ != kBf16;
  EXPECT_EQ(ops::blocks_take(a, wider.narrow(1, 1, 4).t()), any_depth);
  EXPECT_EQ(ops::blocks_take(a.narrow(1, 0, 3), b.narrow(0, 0, 3)), any_depth);
  const ops::RowSource indexed{a, at::arange(3, at::kInt)};
  const bool by_index = factors_ != kBf16 && ops::ColumnBlock<float>::takes_index();
  EXPECT_EQ(ops::blocks_take(indexed, b), by_index);
  EXPECT_EQ(ops::blocks_take(indexed, at::ones({2, 4}, factors_).t()), by_index);
  EXPECT_FALSE(ops::blocks_take(a, {at::ones({2, 4}, factors_).t(), at::arange(4, at::kInt)}));
  EXPECT_EQ(ops::blocks_take(a, {b, at::arange(4, at::kInt)}), by_index);
  const auto multiply = [this](const at::Tensor& x, const at::Tensor& y, std::int64_t rows) {
    ops::block_product_into(x, y, empty(rows, 2), kSoon);
  };
  EXPECT_THROW(multiply(a.narrow(1, 0, 0), b.narrow(0, 0, 0), 3), InternalError);
  EXPECT_THROW(multiply(a, at::ones({6, 2}, factors_), 3), InternalError);
  EXPECT_THROW(multiply(a, b, 2), InternalError);
}

// Every height of a tile, alone and after others, and panels that are not used to the end.
TEST(PanelProduct, equals_sums_in_double_and_leaves_other_columns_alone) {
  for (const std::int64_t rows : {0, 1, 2, 3, 4, 5, 6, 7, 8, 13, 48, 49}) {
    for (const std::int64_t columns : {1, 7, 16}) {
      for (const std::int64_t depth : {1, 5, 512}) {
        const at::Tensor a = random_tensor("a", {rows, depth + 3}, at::kFloat).narrow(1, 2, depth);
        const at::Tensor panel = random_tensor("panel", {depth, ops::kPanelColumns}, at::kFloat);
        const at::Tensor all = at::full({rows, columns + 2}, 7.0F);
        const at::Tensor sums = all.narrow(1, 1, columns);
        const auto multiply = [&](bool adds) {
          ops::panel_product(ops::rows_of<float>(a), rows, panel.const_data_ptr<float>(), depth,
                             ops::mutable_rows_of<float>(sums), columns, adds);
        };
        multiply(/*adds=*/false);
        expect_product(sums, a, panel.narrow(1, 0, columns));
        multiply(/*adds=*/true);
        expect_product(sums, at::cat({a, a}, 1), at::cat({panel, panel}).narrow(1, 0, columns));
        EXPECT_TRUE(at::all(all.narrow(1, 0, 1) == 7.0F).item<bool>());
        EXPECT_TRUE(at::all(all.narrow(1, columns + 1, 1) == 7.0F).item<bool>());
      }
    }
  }
}

TEST(ColumnBlock, two_of_different_dtypes_live_side_by_side) {
  const at::Tensor a = random_tensor("a", {5, 64}, kBf16);
  const at::Tensor b = random_tensor("b", {64, 48}, kBf16);
  const at::Tensor wide_a = a.to(at::kFloat);
  ops::ColumnBlock<c10::BFloat16> narrow(64, 48);
  narrow.order(b, 0, 48, 0);
  ops::ColumnBlock<float> wide(64, 48);
  wide.order(b.to(at::kFloat), 0, 48, 0);
  for (int turn = 0; turn < 2; ++turn) {
    for (const float* sums : {narrow.multiply(ops::rows_of<c10::BFloat16>(a), 5),
                              wide.multiply(ops::rows_of<float>(wide_a), 5)}) {
      const at::Tensor found = at::empty({5, 48}, at::kFloat);
      std::copy_n(sums, found.numel(), found.mutable_data_ptr<float>());
      expect_product(found, a, b);
    }
  }
}

TEST(BlockProducts, an_error_in_a_block_reaches_the_caller_and_the_next_product_is_right) {
  const at::Tensor a = random_tensor("a", {300, 64}, at::kFloat);
  const at::Tensor b = random_tensor("b", {64, 300}, at::kFloat);
  const auto fails = [](const ops::StridedRows<const float>&, const ops::BlockRange& range) {
    COLLEGIUM_CHECK(range.column == 0, "stopped at column {}", range.column);
  };
  EXPECT_THROW(ops::product_in_blocks<float>(a, b, 1, {}, fails), InternalError);
  const at::Tensor out = at::empty({300, 300}, at::kFloat);
  ops::block_product_into(a, b, out, kLater);
  expect_product(out, a, b);
}

TEST(ThreadBuffer, a_thread_gets_the_memory_again_that_it_gave_back_last) {
  std::thread([] {  // which has none
    const auto address = [](std::int64_t bytes) {
      const ops::ThreadBuffer buffer(bytes);
      EXPECT_EQ(reinterpret_cast<std::uintptr_t>(buffer.data<char>()) % 64, 0U);
      return buffer.data<char>();
    };
    const char* first = address(1000);
    EXPECT_EQ(address(1000), first);
    EXPECT_EQ(address(10), first);
    const ops::ThreadBuffer held(1000);
    EXPECT_EQ(held.data<char>(), first);
    const ops::ThreadBuffer other(1000);
    EXPECT_NE(other.data<char>(), held.data<char>());
    const ops::ThreadBuffer none(0);
    std::fill_n(ops::ThreadBuffer(ops::ThreadBuffer::kMostKept + 1).data<char>(), 1000, 'x');
  })
      .join();
}

TEST(ColumnBlock, refuses_columns_beyond_its_own) {
  const at::Tensor b = at::ones({4, 2});
  ops::ColumnBlock<float> block(4, 2);
  EXPECT_THROW(block.set_columns(3), InternalError);
  EXPECT_THROW(block.order(b, 1, 2, 0), InternalError);
  EXPECT_THROW(block.order(b, 0, 2, 1), InternalError);
  EXPECT_THROW(ops::ColumnBlock<float>(0, 2), InternalError);
  EXPECT_THROW(ops::ColumnBlock<c10::BFloat16>(3, 2), InternalError);
}

// A bf16 number, what lies half way to the next one, and the numbers beside both.
TEST(Round, equals_aten_for_ties_their_neighbours_and_extremes) {
  std::vector<float> values = {0.0F,    -0.0F,    std::numeric_limits<float>::infinity(),
                               3.4e38F, -3.4e38F, 1e-37F};
  for (std::uint32_t high = 0x3f00; high < 0x4010; ++high) {
    for (const std::uint32_t low : {0x0000U, 0x0001U, 0x7fffU, 0x8000U, 0x8001U, 0xffffU}) {
      values.push_back(std::bit_cast<float>(high << 16U | low));
      values.push_back(-values.back());
    }
  }
  const at::Tensor wide = at::empty({static_cast<std::int64_t>(values.size())}, at::kFloat);
  std::copy(values.begin(), values.end(), wide.mutable_data_ptr<float>());
  const at::Tensor rounded = at::empty_like(wide, at::kBFloat16);
  ops::round_values(wide.const_data_ptr<float>(), wide.numel(), rounded.mutable_data_ptr<c10::BFloat16>());
  EXPECT_TRUE(at::equal(rounded, wide.to(at::kBFloat16)));
  for (const std::int64_t count : {1, 15, 16, 17}) {
    const at::Tensor nan = at::full({count}, std::numeric_limits<float>::quiet_NaN(), at::kFloat);
    const at::Tensor out = at::zeros({count + 1}, at::kBFloat16);
    ops::round_values(nan.const_data_ptr<float>(), count, out.mutable_data_ptr<c10::BFloat16>());
    EXPECT_TRUE(out.narrow(0, 0, count).isnan().all().item<bool>());
    EXPECT_EQ(out[count].item<float>(), 0.0F);
  }
}

// Whether it is one of a vector's or of the tail, a number is rounded in one way: to nearest, or, by the
// processor's instruction, to zero.
TEST(Round, subnormal_numbers_are_treated_alike) {
  const at::Tensor small = at::full({19}, 1e-39, at::kFloat);
  const at::Tensor out = at::empty({19}, at::kBFloat16);
  ops::round_values(small.const_data_ptr<float>(), 19, out.mutable_data_ptr<c10::BFloat16>());
  EXPECT_TRUE(at::all(out == out[0]).item<bool>());
  EXPECT_TRUE(at::equal(out, small.to(at::kBFloat16)) || at::equal(out, at::zeros_like(out)));
}

}  // namespace
}  // namespace collegium
