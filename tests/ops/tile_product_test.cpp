// SPDX-License-Identifier: Apache-2.0

// Products on tiles and what is fused with them: against double precision, and bit for bit against the same
// steps one after the other. On processors without AMX all of it runs by plain loops.

#include "collegium/ops/tile_product.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/equal.h>
#include <gtest/gtest.h>

#include <bit>
#include <functional>
#include <limits>

#include "collegium/base/error.h"
#include "collegium/ops/gated_product.h"
#include "collegium/ops/product.h"
#include "collegium/ops/round.h"
#include "collegium/ops/swiglu.h"
#include "tests/support/bf16_products.h"
#include "tests/support/products.h"
#include "tests/support/tensors.h"

namespace collegium {
namespace {

using test::expect_product;
using test::random_tensor;

// What lies beside `a` is not a number, and what lies beside the result must stay.
void expect_product_beside(const at::Tensor& a, const at::Tensor& b, std::int64_t left, std::int64_t stride) {
  const std::int64_t columns = b.size(1);
  const at::Tensor all = at::full({a.size(0) + 2, stride}, 7.0, at::kBFloat16);
  const at::Tensor out = all.narrow(0, 1, a.size(0)).narrow(1, left, columns);
  ops::tile_product_into(a, b, out, ops::Reuse::kLater);
  expect_product(out, a, b);
  const at::Tensor plain = at::empty({a.size(0), columns}, at::kBFloat16);
  ops::tile_product_into(a, b.t().contiguous().t(), plain, ops::Reuse::kSoon);
  EXPECT_TRUE(at::equal(plain, out));
  out.fill_(7.0);
  EXPECT_TRUE(at::all(all == 7.0).item<bool>()) << "something was written beside the result";
}

at::Tensor between_nan(std::int64_t rows, std::int64_t depth) {
  const at::Tensor all = at::full({rows, depth + 4}, std::numeric_limits<float>::quiet_NaN(), at::kBFloat16);
  return all.narrow(1, 2, depth).copy_(random_tensor("a", {rows, depth}, at::kBFloat16));
}

// Columns around a block's, depths around an instruction's and a part's, rows around a block's.
TEST(TileProduct, equals_double_precision_for_every_size) {
  for (const std::int64_t depth : {2, 30, 32, 34, 1022, 1026, 2050}) {
    for (const std::int64_t columns : {1, 15, 16, 255, 256, 257, 530}) {
      for (const std::int64_t rows : {1, 31, 32, 70}) {
        SCOPED_TRACE(testing::Message() << rows << " x " << depth << " x " << columns);
        const at::Tensor b = random_tensor("b", {depth, columns}, at::kBFloat16);
        expect_product_beside(between_nan(rows, depth), b, 2, columns + 3);
      }
    }
  }
}

TEST(TileProduct, results_may_be_written_past_the_cache) {
  for (const std::int64_t columns : {32, 256, 320}) {
    for (const std::int64_t rows : {1, 33}) {
      const at::Tensor b = random_tensor("b", {64, columns}, at::kBFloat16);
      expect_product_beside(between_nan(rows, 64), b, 32, columns + 64);
    }
  }
}

TEST(TileProduct, nothing_one_and_repeated_rows) {
  const at::Tensor b = random_tensor("b", {6, 5}, at::kBFloat16);
  const at::Tensor column = random_tensor("a", {6, 1}, at::kBFloat16);
  const at::Tensor row = at::empty({1, 5}, at::kBFloat16);
  ASSERT_TRUE(ops::tiles_take(column.t(), b));
  ops::tile_product_into(column.t(), b, row, ops::Reuse::kSoon);
  expect_product(row, column.t(), b);
  EXPECT_FALSE(ops::tiles_take(column.t().expand({3, 6}), b)) << "rows that overlap";
  const at::Tensor one = at::empty({4, 1}, at::kBFloat16);
  const at::Tensor a = random_tensor("rows", {4, 6}, at::kBFloat16);
  ops::tile_product_into(a, column, one, ops::Reuse::kLater);
  expect_product(one, a, column);
  const at::Tensor no_rows = at::empty({0, 5}, at::kBFloat16);
  ops::tile_product_into(a.narrow(0, 0, 0), b, no_rows, ops::Reuse::kLater);
  const at::Tensor no_columns = at::empty({4, 0}, at::kBFloat16);
  ops::tile_product_into(a, b.narrow(1, 0, 0), no_columns, ops::Reuse::kLater);
}

TEST(TileProduct, a_row_depends_on_that_row_alone) {
  const at::Tensor a = random_tensor("a", {67, 96}, at::kBFloat16);
  const at::Tensor b = random_tensor("b", {96, 300}, at::kBFloat16);
  const at::Tensor all = at::empty({67, 300}, at::kBFloat16);
  ops::tile_product_into(a, b, all, ops::Reuse::kSoon);
  for (const auto& [first, count] : {std::pair{0, 1}, {1, 40}, {35, 32}, {66, 1}}) {
    const at::Tensor some = at::empty({count, 300}, at::kBFloat16);
    ops::tile_product_into(a.narrow(0, first, count), b, some, ops::Reuse::kSoon);
    EXPECT_TRUE(at::equal(some, all.narrow(0, first, count)));
  }
}

TEST(TileProduct, a_block_of_two_parts_by_tiles_and_by_plain_loops) {
  for (const bool tiles : {false, ops::TileBlock::has_tiles()}) {
    for (const auto& [depth, columns] : {std::pair{2, 1}, {96, 256}, {1500, 40}}) {
      for (const std::int64_t rows : {std::int64_t{1}, ops::TileBlock::kRows}) {
        const at::Tensor a = between_nan(rows, depth);
        const at::Tensor b = random_tensor("b", {depth, columns + 5}, at::kBFloat16);
        ops::TileBlock block(depth, columns, tiles);
        // The part to the right comes first.
        const std::int64_t left = columns / 2;
        block.order(b, 3, columns - left, left);
        block.order(b, 3 + columns - left, left, 0);
        const auto found = block.multiply(ops::rows_of<c10::BFloat16>(a), rows);
        const at::Tensor copy = at::empty({rows, columns}, at::kBFloat16);
        block.write(found, rows, columns, ops::mutable_rows_of<c10::BFloat16>(copy), ops::Reuse::kSoon);
        const at::Tensor right = b.narrow(1, 3, columns - left);
        expect_product(copy, a, at::cat({b.narrow(1, 3 + columns - left, left), right}, 1));
      }
    }
  }
}

TEST(TileProduct, not_a_number_and_infinity_stay) {
  test::expect_not_a_number_and_infinity_stay([](const auto& a, const auto& b, const auto& out) {
    ops::tile_product_into(a, b, out, ops::Reuse::kSoon);
  });
}

TEST(TileProduct, declines_what_it_cannot_multiply) {
  const at::Tensor a = at::ones({3, 4}, at::kBFloat16);
  const at::Tensor b = at::ones({4, 2}, at::kBFloat16);
  EXPECT_TRUE(ops::tiles_take(a, b));
  EXPECT_TRUE(ops::tiles_take(a, at::ones({2, 4}, at::kBFloat16).t()));
  const at::Tensor wider = at::ones({2, 6}, at::kBFloat16);
  EXPECT_TRUE(ops::tiles_take(a, wider.narrow(1, 2, 4).t()));
  EXPECT_FALSE(ops::tiles_take(a, wider.narrow(1, 1, 4).t()));
  EXPECT_FALSE(ops::tiles_take(a.to(at::kFloat), b));
  EXPECT_FALSE(ops::tiles_take(a, b.to(at::kFloat)));
  EXPECT_FALSE(ops::tiles_take(a.narrow(1, 0, 3), b.narrow(0, 0, 3)));
  EXPECT_FALSE(ops::tiles_take(a.narrow(1, 0, 0), b.narrow(0, 0, 0)));
  EXPECT_FALSE(ops::tiles_take(at::ones({4, 4}, at::kBFloat16).t(), b));
  EXPECT_THROW(ops::tile_product_into(a.narrow(1, 0, 3), b.narrow(0, 0, 3), at::empty({3, 2}, at::kBFloat16),
                                      ops::Reuse::kSoon),
               InternalError);
  EXPECT_THROW(ops::tile_product_into(a, at::ones({6, 2}, at::kBFloat16), at::empty({3, 2}, at::kBFloat16),
                                      ops::Reuse::kSoon),
               InternalError);
  EXPECT_THROW(ops::tile_product_into(a, b, at::empty({2, 2}, at::kBFloat16), ops::Reuse::kSoon),
               InternalError);
  ops::TileBlock block(4, 2);
  EXPECT_THROW(block.set_columns(3), InternalError);
  EXPECT_THROW(block.order(b, 1, 2, 0), InternalError);
  EXPECT_THROW(block.order(b, 0, 2, 1), InternalError);
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

// Whether it is one of a vector's or of the tail, a number is rounded in one way.
TEST(Round, subnormal_numbers_are_treated_alike) {
  const at::Tensor small = at::full({19}, 1e-39, at::kFloat);
  const at::Tensor out = at::empty({19}, at::kBFloat16);
  ops::round_values(small.const_data_ptr<float>(), 19, out.mutable_data_ptr<c10::BFloat16>());
  EXPECT_TRUE(at::all(out == out[0]).item<bool>());
  EXPECT_LE(out[0].item<float>(), 1.01e-39F);
}

struct Gated {
  at::Tensor x_RD;
  at::Tensor gate_up_GD;
  at::Tensor down_DF;
  at::Tensor weights_R;
};

// Pieces of larger tensors.
Gated gated(std::int64_t rows, std::int64_t hidden, std::int64_t width, bool weighted) {
  return {random_tensor("x", {rows, hidden + 2}, at::kBFloat16).narrow(1, 2, hidden),
          (random_tensor("gate_up", {2 * width, hidden + 2}, at::kBFloat16) * 0.1).narrow(1, 2, hidden),
          random_tensor("down", {hidden, width + 1}, at::kBFloat16).narrow(1, 1, width),
          weighted ? random_tensor("weights", {rows}, at::kFloat) : at::Tensor()};
}

// Depths that tiles decline and that take two parts; widths around a block's.
void for_every_size(const std::function<void(const Gated&)>& check) {
  for (const std::int64_t hidden : {7, 64, 1030}) {
    for (const std::int64_t width : {1, 5, 96, 128, 256, 270}) {
      if (hidden > 64 && width != 270) continue;
      for (const std::int64_t rows : {1, 32, 77}) {
        SCOPED_TRACE(testing::Message() << rows << " rows, " << hidden << " -> " << width);
        check(gated(rows, hidden, width, /*weighted=*/rows != 32));
      }
    }
  }
}

class GatedProduct : public testing::TestWithParam<ops::Bf16Products> {};
INSTANTIATE_TEST_SUITE_P(Bf16, GatedProduct, testing::ValuesIn(ops::kAllBf16Products));

TEST_P(GatedProduct, equals_product_and_swiglu_bit_for_bit) {
  const test::AssumeBf16Products assume(GetParam());
  for_every_size([](const Gated& g) {
    const at::Tensor gate_up = at::empty({g.x_RD.size(0), g.gate_up_GD.size(0)}, at::kBFloat16);
    const at::Tensor activation = at::empty({g.x_RD.size(0), g.down_DF.size(1)}, at::kBFloat16);
    ops::gated_product_into(g.x_RD, g.gate_up_GD, g.weights_R, gate_up, activation);
    const at::Tensor expected = at::empty_like(gate_up);
    ops::product_into(g.x_RD, g.gate_up_GD.t(), expected);
    EXPECT_TRUE(at::equal(gate_up, expected));
    expect_product(gate_up, g.x_RD, g.gate_up_GD.t());
    EXPECT_TRUE(at::equal(activation, ops::swiglu(expected, g.weights_R)));
  });
}

TEST_P(GatedProduct, backward_equals_product_and_gradients_bit_for_bit) {
  const test::AssumeBf16Products assume(GetParam());
  for_every_size([](const Gated& g) {
    const bool weighted = g.weights_R.defined();
    const at::Tensor gate_up = random_tensor("h", {g.x_RD.size(0), g.gate_up_GD.size(0)}, at::kBFloat16);
    const at::Tensor inner = at::empty({g.x_RD.size(0), g.down_DF.size(1)}, at::kBFloat16);
    const ops::SwigluGradients found{.gate_up_RG = at::empty_like(gate_up),
                                     .weights_R = weighted ? at::empty_like(g.weights_R) : at::Tensor()};
    const at::Tensor activation = weighted ? at::empty_like(inner) : at::Tensor();
    ops::gated_product_backward_into(g.x_RD, g.down_DF, gate_up, g.weights_R, found, activation, inner);
    ops::product_into(g.x_RD, g.down_DF, inner);
    const ops::SwigluGradients expected = ops::swiglu_backward(inner, gate_up, g.weights_R);
    EXPECT_TRUE(at::equal(found.gate_up_RG, expected.gate_up_RG));
    if (!weighted) return;
    EXPECT_TRUE(at::equal(found.weights_R, expected.weights_R));
    EXPECT_TRUE(at::equal(activation, ops::swiglu(gate_up, g.weights_R)));
  });
}

TEST_P(GatedProduct, refuses_sizes_that_differ) {
  const test::AssumeBf16Products assume(GetParam());
  const auto ones = [](std::int64_t rows, std::int64_t columns) {
    return at::ones({rows, columns}, at::kBFloat16);
  };
  EXPECT_THROW(ops::gated_product_into(ones(3, 4), ones(6, 6), {}, ones(3, 6), ones(3, 3)), InternalError);
  EXPECT_THROW(ops::gated_product_into(ones(3, 4), ones(6, 4), {}, ones(2, 6), ones(3, 3)), InternalError);
  EXPECT_THROW(ops::gated_product_into(ones(3, 4), ones(6, 4), {}, ones(3, 6), ones(3, 2)), InternalError);
  EXPECT_THROW(ops::gated_product_backward_into(ones(3, 4), ones(4, 3), ones(3, 4), {}, {ones(3, 6), {}}, {},
                                                ones(3, 3)),
               InternalError);
  EXPECT_THROW(ops::gated_product_backward_into(ones(3, 4), ones(4, 2), ones(3, 6), {}, {ones(3, 6), {}}, {},
                                                ones(3, 3)),
               InternalError);
}

}  // namespace
}  // namespace collegium
