// SPDX-License-Identifier: Apache-2.0

// Products with SwiGLU and its gradient fused, bit for bit against the same steps one after the other, for
// every way of multiplying.

#include "collegium/ops/gated_product.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/ones.h>
#include <gtest/gtest.h>

#include <functional>

#include "collegium/base/error.h"
#include "collegium/ops/product.h"
#include "collegium/ops/swiglu.h"
#include "tests/support/product_ways.h"
#include "tests/support/products.h"
#include "tests/support/tensors.h"

namespace collegium {
namespace {

using test::expect_product;
using test::random_tensor;

struct Gated {
  at::Tensor x_RD;
  at::Tensor gate_up_GD;
  at::Tensor down_DF;
  at::Tensor weights_R;
  at::ScalarType dtype;  // of results

  at::Tensor empty(std::int64_t columns) const { return at::empty({x_RD.size(0), columns}, dtype); }
};

// Pieces of larger tensors; factors in the dtype of products, as an expert's task has them.
Gated gated(at::ScalarType dtype, std::int64_t rows, std::int64_t hidden, std::int64_t width, bool weighted) {
  const auto factor = [dtype](const char* name, std::int64_t height, std::int64_t columns) {
    return random_tensor(name, {height, columns}, dtype).to(ops::product_dtype(dtype));
  };
  return {.x_RD = factor("x", rows, hidden + 2).narrow(1, 2, hidden),
          .gate_up_GD = (factor("gate_up", 2 * width, hidden + 2) * 0.1).narrow(1, 2, hidden),
          .down_DF = factor("down", hidden, width + 1).narrow(1, 1, width),
          .weights_R = weighted ? random_tensor("weights", {rows}, at::kFloat) : at::Tensor(),
          .dtype = dtype};
}

// Depths that blocks of bf16 decline and that take two parts; widths around a block's.
void for_every_size(const std::function<void(const Gated&)>& check) {
  for (const std::int64_t hidden : {7, 64, 1030}) {
    for (const std::int64_t width : {1, 5, 96, 128, 256, 270}) {
      if (hidden > 64 && width != 270) continue;
      for (const std::int64_t rows : {1, 32, 77}) {
        SCOPED_TRACE(testing::Message() << rows << " rows, " << hidden << " -> " << width);
        for (const auto dtype : {at::kBFloat16, at::kFloat})
          check(gated(dtype, rows, hidden, width, /*weighted=*/rows != 32));
      }
    }
  }
}

class GatedProduct : public testing::TestWithParam<ops::ProductWays> {
 private:
  test::AssumeProductWays assume_{GetParam()};
};
INSTANTIATE_TEST_SUITE_P(Ways, GatedProduct, testing::ValuesIn(ops::kAllProductWays));

TEST_P(GatedProduct, equals_product_and_swiglu_bit_for_bit) {
  for_every_size([](const Gated& g) {
    const at::Tensor gate_up = g.empty(g.gate_up_GD.size(0));
    const at::Tensor activation = g.empty(g.down_DF.size(1));
    ops::gated_product_into(g.x_RD, g.gate_up_GD, g.weights_R, gate_up, activation);
    const at::Tensor expected = at::empty_like(gate_up);
    ops::product_into(g.x_RD, g.gate_up_GD.t(), expected);
    EXPECT_TRUE(at::equal(gate_up, expected));
    expect_product(gate_up, g.x_RD, g.gate_up_GD.t());
    EXPECT_TRUE(at::equal(activation, ops::swiglu(expected, g.weights_R)));
  });
}

TEST_P(GatedProduct, backward_equals_product_and_gradients_bit_for_bit) {
  for_every_size([](const Gated& g) {
    const bool weighted = g.weights_R.defined();
    const at::Tensor gate_up = random_tensor("h", {g.x_RD.size(0), g.gate_up_GD.size(0)}, g.dtype);
    const at::Tensor inner = g.empty(g.down_DF.size(1));
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
