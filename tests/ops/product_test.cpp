// SPDX-License-Identifier: Apache-2.0

// Products in the compute dtype against the same in double precision: every way of multiplying,
// whatever this machine has, for every layout of operands that training uses and sizes around every cut.

#include "collegium/ops/product.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/full.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <gtest/gtest.h>

#include <functional>

#include "collegium/ops/column_block.h"
#include "tests/support/product_ways.h"
#include "tests/support/products.h"
#include "tests/support/tensors.h"

namespace collegium {
namespace {

using test::expect_product;
using test::random_tensor;

// A matrix whose rows or columns lie apart in memory, as a piece of a larger tensor's do.
at::Tensor matrix(std::string_view name, std::int64_t rows, std::int64_t columns, at::ScalarType dtype,
                  const std::string& layout) {
  if (layout == "turned") return random_tensor(name, {columns, rows}, dtype).t();
  if (layout == "piece") return random_tensor(name, {rows, columns + 3}, dtype).narrow(1, 1, columns);
  if (layout == "turned piece") return random_tensor(name, {columns, rows + 3}, dtype).narrow(1, 1, rows).t();
  return random_tensor(name, {rows, columns}, dtype);
}

TEST(Product, equals_double_precision_in_every_layout) {
  for (const auto ways : ops::kAllProductWays) {
    const test::AssumeProductWays assume(ways);
    for (const auto dtype : {at::kDouble, at::kFloat, at::kBFloat16}) {
      for (const std::string a_layout : {"plain", "turned", "piece", "turned piece"}) {
        for (const std::string b_layout : {"plain", "turned", "piece", "turned piece"}) {
          SCOPED_TRACE(a_layout + " times " + b_layout);
          // Several tiles down and across; and one. Blocks of bf16 take even depths only.
          for (const auto& [rows, depth, columns] :
               {std::tuple{141, 29, 523}, {37, 29, 41}, {141, 30, 523}, {37, 30, 41}}) {
            const at::Tensor a = matrix("a", rows, depth, dtype, a_layout);
            const at::Tensor b = matrix("b", depth, columns, dtype, b_layout);
            expect_product(ops::product(a, b), a, b);
            for (const std::string out_layout : {"plain", "piece", "turned"}) {
              const at::Tensor out = matrix("out", rows, columns, dtype, out_layout);
              ops::product_into(a, b, out);
              expect_product(out, a, b);
            }
          }
        }
      }
    }
  }
}

TEST(Product, widens_every_number_of_rows_and_columns) {
  for (const std::int64_t rows : {0, 1, 7, 8, 127, 128, 129, 257}) {
    for (const std::int64_t columns : {0, 1, 511, 512, 513, 1025}) {
      const at::Tensor a = random_tensor("a", {rows, 17}, at::kBFloat16);
      const at::Tensor b = random_tensor("b", {17, columns}, at::kBFloat16);
      const at::Tensor product = ops::widened_product(a, b);
      EXPECT_EQ(product.sizes(), (std::vector<std::int64_t>{rows, columns}));
      if (product.numel() > 0) expect_product(product, a, b);
      EXPECT_TRUE(at::equal(ops::widened_product(a, b.to(at::kFloat)), product));
    }
  }
}

TEST(Product, multiplies_fp32_around_every_cut_of_its_tiles_and_beyond_its_depth) {
  for (const std::string b_layout : {"plain", "turned", "piece"}) {
    for (const auto& [rows, depth, columns] : {std::tuple{0, 5, 3},
                                               {96, 5, 0},
                                               {1, 5, 300},
                                               {95, 600, 300},
                                               {96, 600, 256},
                                               {97, 600, 257},
                                               {575, 3, 255},
                                               {577, 513, 513},
                                               {4000, 2, 20},
                                               {100, 4096, 7},
                                               {100, 4097, 7}}) {
      const at::Tensor a = random_tensor("a", {rows, depth}, at::kFloat);
      const at::Tensor b = matrix("b", depth, columns, at::kFloat, b_layout);
      const at::Tensor product = ops::product(a, b);
      EXPECT_EQ(product.sizes(), (std::vector<std::int64_t>{rows, columns}));
      if (product.numel() > 0) expect_product(product, a, b);
      // The same whatever the tiles are.
      if (!ops::products_are_own(a) || rows < 96 || depth > 4096) continue;
      const at::Tensor whole = at::empty({rows, columns}, at::kFloat);
      ops::block_product_into(a, b, whole, ops::Reuse::kSoon);
      EXPECT_TRUE(at::equal(product, whole)) << rows << " x " << depth << " x " << columns;
    }
  }
  const at::Tensor no_depth = ops::product(at::ones({100, 0}), at::ones({0, 3}));
  EXPECT_TRUE(at::equal(no_depth, at::zeros({100, 3})));
}

TEST(Product, writes_nothing_around_its_result) {
  const at::Tensor a = random_tensor("a", {130, 17}, at::kBFloat16);
  const at::Tensor b = random_tensor("b", {17, 9}, at::kBFloat16);
  const at::Tensor around = at::full({132, 11}, 7.0, at::kBFloat16);
  const at::Tensor inside = around.narrow(0, 1, 130).narrow(1, 1, 9);
  ops::widened_product_into(a, b, inside);
  expect_product(inside, a, b);
  inside.fill_(7.0);
  EXPECT_TRUE(at::equal(around, at::full_like(around, 7.0)));
}

TEST(Product, widens_a_large_factor_in_parts) {
  const at::Tensor a = random_tensor("a", {3, 65}, at::kBFloat16);
  const at::Tensor row = random_tensor("b", {1, ops::kMostWidened / 65 + 7}, at::kBFloat16);
  const at::Tensor b = row.expand({65, row.size(1)}).contiguous();
  const at::Tensor out = at::empty({3, b.size(1)}, at::kBFloat16);
  ops::widened_product_into(a, b, out);
  expect_product(out, a, b);
}

TEST(Product, an_empty_sum_is_zero) {
  const at::Tensor out = at::full({5, 4}, 7.0, at::kBFloat16);
  ops::widened_product_into(at::empty({5, 0}, at::kBFloat16), at::empty({0, 4}, at::kBFloat16), out);
  EXPECT_TRUE(at::equal(out, at::zeros_like(out)));
}

TEST(Product, not_a_number_and_infinity_stay) {
  for (const auto ways : ops::kAllProductWays) {
    const test::AssumeProductWays assume(ways);
    test::expect_not_a_number_and_infinity_stay(
        [](const auto& a, const auto& b, const auto& out) { ops::widened_product_into(a, b, out); });
  }
}

void expect_threads_change_nothing(const std::function<at::Tensor()>& multiply) {
  const int threads = at::get_num_threads();
  std::vector<at::Tensor> results;
  for (const int count : {1, 2, 3, 7}) {
    at::set_num_threads(count);
    results.push_back(multiply());
    EXPECT_TRUE(at::equal(results.front(), results.back())) << count << " threads";
  }
  at::set_num_threads(threads);
}

TEST(Product, widened_results_do_not_depend_on_threads) {
  const at::Tensor a = random_tensor("a", {300, 2048}, at::kBFloat16);
  const at::Tensor b = random_tensor("b", {2048, 21}, at::kBFloat16);
  expect_threads_change_nothing([&] { return ops::widened_product(a, b); });
}

TEST(Product, tiles_do_not_depend_on_threads) {
  const at::Tensor a = random_tensor("a", {1100, 40}, at::kFloat);
  const at::Tensor b = random_tensor("b", {40, 600}, at::kFloat);
  if (!ops::products_are_own(a)) GTEST_SKIP() << "ATen's whole product, which may depend on threads";
  expect_threads_change_nothing([&] { return ops::product(a, b); });
}

TEST(Product, blocks_take_no_bf16_that_is_to_be_widened_and_no_single_row_of_fp32) {
  const auto in_blocks = [](at::ScalarType dtype, std::int64_t rows) {
    return ops::multiplies_in_blocks(at::ones({rows, 4}, dtype), at::ones({4, 2}, dtype));
  };
  for (const auto ways : ops::kAllProductWays) {
    const test::AssumeProductWays assume(ways);
    EXPECT_EQ(in_blocks(at::kBFloat16, 3), ways.blocks && !ways.widen_bf16);
    EXPECT_EQ(in_blocks(at::kBFloat16, 1), ways.blocks && !ways.widen_bf16);
    EXPECT_EQ(in_blocks(at::kFloat, 3), ways.blocks);
    EXPECT_FALSE(in_blocks(at::kFloat, 1));
    EXPECT_FALSE(in_blocks(at::kDouble, 3));
  }
}

#if defined(__x86_64__)
TEST(Product, cores_without_avx512_widen_and_multiply_in_panels_if_they_have_avx2) {
  if (__builtin_cpu_supports("avx512f") == 0) {
    EXPECT_EQ(ops::product_ways().blocks, __builtin_cpu_supports("avx2") != 0);
    EXPECT_TRUE(ops::product_ways().widen_bf16);
    EXPECT_FALSE(ops::has_block_kernel<float>());
  }
}
#endif

TEST(Product, the_dtype_of_products_follows_the_machine) {
  EXPECT_EQ(ops::product_dtype(at::kDouble), at::kDouble);
  EXPECT_EQ(ops::product_dtype(at::kFloat), at::kFloat);
  EXPECT_EQ(ops::product_dtype(at::kBFloat16), ops::product_ways().widen_bf16 ? at::kFloat : at::kBFloat16);
}

}  // namespace
}  // namespace collegium
