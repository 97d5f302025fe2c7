// SPDX-License-Identifier: Apache-2.0
// The row kernels of the model against chains of ATen operations in double precision.
#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/full.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <array>
#include <cmath>

#include "collegium/base/error.h"
#include "collegium/model/embedding.h"
#include "collegium/model/linear.h"
#include "collegium/model/norm.h"
#include "collegium/model/rotary.h"
#include "collegium/model/softmax_loss.h"
#include "tests/support/product_ways.h"
#include "tests/support/tensors.h"

namespace collegium::model {
namespace {

using test::bound;
using test::random_tensor;
using test::relative_difference;

constexpr std::array kDtypes = {at::kDouble, at::kFloat, at::kBFloat16};

// The same rounded numbers in `dtype` and in double, both as autograd leaves.
struct Leaves {
  at::Tensor value;
  at::Tensor exact;
};
Leaves leaves(const char* name, at::IntArrayRef shape, at::ScalarType dtype) {
  const at::Tensor value = random_tensor(name, shape, dtype);
  return {value.clone().requires_grad_(true), value.to(at::kDouble).clone().requires_grad_(true)};
}

void expect_gradients(const at::Tensor& y, const at::Tensor& exact_y, const std::vector<Leaves>& inputs,
                      double tolerance) {
  EXPECT_LE(relative_difference(y, exact_y), tolerance);
  const at::Tensor grad = random_tensor("grad", y.sizes(), y.scalar_type());
  torch::autograd::backward({y}, {grad});
  torch::autograd::backward({exact_y}, {grad.to(at::kDouble)});
  for (const Leaves& input : inputs)
    EXPECT_LE(relative_difference(input.value.grad(), input.exact.grad()), tolerance);
}

// Widths below, at and above the 16 lanes, rows below and above one task of 128. Not width 1: there the
// gradient of x is what eps leaves of a difference of equal numbers, and has no relative accuracy in any
// formula.
TEST(RmsNorm, equals_its_formula_in_every_dtype) {
  for (const auto dtype : kDtypes) {
    for (const std::int64_t width : {7, 16, 53}) {
      for (const std::int64_t rows : {1, 130, 257}) {
        const Leaves x = leaves("x", {rows, width}, dtype);
        const Leaves w = leaves("w", {width}, dtype);
        expect_gradients(rms_norm(x.value, w.value, 1e-5), rms_norm_aten(x.exact, w.exact, 1e-5), {x, w},
                         bound(dtype, dtype == at::kBFloat16 ? 4 : width + rows));
      }
    }
  }
}

TEST(RmsNorm, takes_no_rows_and_strided_input) {
  const at::Tensor w = random_tensor("w", {6});
  EXPECT_EQ(rms_norm(at::empty({0, 6}, at::kDouble), w, 1e-5).size(0), 0);
  const at::Tensor x = random_tensor("x", {6, 5}).t();
  EXPECT_LE(relative_difference(rms_norm(x, w, 1e-5), rms_norm_aten(x, w, 1e-5)), bound(at::kDouble, 6));
}

TEST(Rotary, equals_its_formula_in_every_dtype) {
  for (const auto dtype : kDtypes) {
    const Leaves x = leaves("x", {2, 37, 3, 14}, dtype);
    expect_gradients(apply_rotary(x.value, rotary_tables(5, 37, 14, 1e4, dtype)),
                     apply_rotary_aten(x.exact, rotary_tables(5, 37, 14, 1e4, at::kDouble)), {x},
                     bound(dtype, 4));
  }
}

// A score depends on the distance of two positions alone.
TEST(Rotary, keeps_products_under_a_shift_of_both_positions) {
  const at::Tensor q = random_tensor("q", {1, 1, 1, 8});
  const at::Tensor k = random_tensor("k", {1, 1, 1, 8});
  const auto score = [&](std::int64_t query, std::int64_t key) {
    return (apply_rotary(q, rotary_tables(query, 1, 8, 1e4, at::kDouble)) *
            apply_rotary(k, rotary_tables(key, 1, 8, 1e4, at::kDouble)))
        .sum()
        .item<double>();
  };
  // Angles up to 1000 carry an absolute error of 1000 epsilon.
  EXPECT_NEAR(score(7, 3), score(1004, 1000), 8 * 1000 * test::epsilon(at::kDouble));
  EXPECT_GT(std::abs(score(7, 3) - score(7, 4)), 1e-3);
}

TEST(SoftmaxLoss, equals_log_softmax_with_and_without_targets) {
  for (const auto dtype : kDtypes) {
    for (const std::int64_t width : {1, 15, 16, 61}) {
      at::Tensor logits = random_tensor("logits", {9, width}, dtype) * 20;
      const at::Tensor targets = at::arange(9, at::kLong).remainder(width);
      targets[4] = kNoTarget;
      at::Tensor exact = logits.to(at::kDouble).clone();
      const at::Tensor exact_losses = softmax_loss_aten(exact, targets, true);
      at::Tensor untouched = logits.clone();
      const at::Tensor losses = softmax_loss(untouched, targets, false);
      EXPECT_TRUE(at::equal(untouched, logits));
      EXPECT_TRUE(at::equal(losses, softmax_loss(logits, targets, true)));
      EXPECT_LE(relative_difference(losses, exact_losses),
                bound(dtype == at::kDouble ? at::kDouble : at::kFloat, width + 8));
      EXPECT_LE(relative_difference(logits, exact), bound(dtype, dtype == at::kBFloat16 ? 1 : width + 8));
      EXPECT_EQ(losses[4].item<double>(), 0.0);
      EXPECT_EQ(logits[4].abs().sum().item<double>(), 0.0);
    }
  }
}

TEST(SoftmaxLoss, survives_huge_logits_and_passes_nan_on) {
  at::Tensor logits = at::full({1, 20}, -3e38, at::kFloat);
  logits[0][3] = 3e38;
  EXPECT_EQ(softmax_loss(logits, at::full({1}, 3, at::kLong), true).item<double>(), 0.0);
  EXPECT_EQ(logits.abs().sum().item<double>(), 0.0);
  logits[0][17] = std::nan("");
  EXPECT_TRUE(std::isnan(softmax_loss(logits, at::full({1}, 3, at::kLong), false).item<double>()));
}

TEST(SoftmaxLoss, refuses_a_target_outside_the_vocabulary) {
  at::Tensor logits = at::zeros({1, 4}, at::kFloat);
  EXPECT_THROW(softmax_loss(logits, at::full({1}, 4, at::kLong), true), InternalError);
}

TEST(Embedding, sums_a_frequent_token_in_fp32_and_skips_padding) {
  // 4096 gradients of 1: in bf16 a running sum would stop at 256.
  const at::Tensor weight = at::zeros({5, 3}, at::kBFloat16).requires_grad_(true);
  at::Tensor ids = at::full({2, 2050}, 2, at::kLong);
  ids.select(1, 0).fill_(1);
  ids.select(1, 1).fill_(4);
  embed(weight, ids, /*padding_id=*/1).sum().backward();
  const at::Tensor rows = weight.grad().to(at::kDouble).select(1, 0);
  EXPECT_TRUE(at::equal(rows, at::tensor({0.0, 0.0, 4096.0, 0.0, 2.0}, at::kDouble)));
}

TEST(Linear, and_its_gradients_equal_double_precision_with_and_without_bf16_instructions) {
  for (const auto ways : ops::kAllProductWays) {
    const test::AssumeProductWays assume(ways);
    for (const auto dtype : kDtypes) {
      for (const std::int64_t rows : {1, 5, 130}) {
        const at::Tensor x = random_tensor("x", {2, rows, 19}, dtype).requires_grad_(true);
        const at::Tensor w = random_tensor("w", {23, 19}, dtype).requires_grad_(true);
        const at::Tensor grad = random_tensor("grad", {2, rows, 23}, dtype);
        const at::Tensor y = model::linear(x, w);
        EXPECT_EQ(y.sizes(), grad.sizes());
        y.backward(grad);
        const auto flat = [](const at::Tensor& t) {
          return t.detach().to(at::kDouble).reshape({-1, t.size(-1)});
        };
        const at::ScalarType sums = dtype == at::kDouble ? at::kDouble : at::kFloat;
        const double limit = bound(dtype, 1) + bound(sums, 2 * rows + 23);
        EXPECT_LE(relative_difference(flat(y), flat(x).mm(flat(w).t())), limit);
        EXPECT_LE(relative_difference(flat(x.grad()), flat(grad).mm(flat(w))), limit);
        EXPECT_LE(relative_difference(flat(w.grad()), flat(grad).t().mm(flat(x))), limit);
        const at::Tensor frozen = random_tensor("w", {23, 19}, dtype);
        const at::Tensor x_only = x.detach().requires_grad_(true);
        model::linear(x_only, frozen).backward(grad);
        EXPECT_TRUE(at::equal(x_only.grad(), x.grad()));
        const at::Tensor w_only = w.detach().requires_grad_(true);
        model::linear(x.detach(), w_only).backward(grad);
        EXPECT_TRUE(at::equal(w_only.grad(), w.grad()));
        const at::Tensor strided = at::stack({x.detach(), x.detach()}, 3).select(3, 0);
        EXPECT_TRUE(at::equal(model::linear(strided, w), y));
      }
    }
  }
}

TEST(Linear, keeps_no_input_for_a_frozen_weight) {
  for (const auto ways : ops::kAllProductWays) {
    const test::AssumeProductWays assume(ways);
    for (const auto dtype : kDtypes) {
      const at::Tensor x = random_tensor("x", {130, 19}, dtype).requires_grad_(true);
      const at::Tensor inner = x * 2;
      const at::Tensor y = model::linear(inner, random_tensor("w", {23, 19}, dtype));
      EXPECT_EQ(inner.storage().use_count(), 1U);
      y.sum().backward();
      EXPECT_TRUE(x.grad().defined());
    }
  }
}

}  // namespace
}  // namespace collegium::model
