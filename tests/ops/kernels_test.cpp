// SPDX-License-Identifier: Apache-2.0

// The kernels against their ATen forms and the plain-loop references, at sizes around vector widths and task
// sizes.

#include <ATen/ops/all.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include "collegium/base/error.h"
#include "collegium/ops/choice_sums.h"
#include "collegium/ops/permute.h"
#include "collegium/ops/swiglu.h"
#include "collegium/ops/topk.h"
#include "collegium/ops/transpose.h"
#include "collegium/ops/wide_linear.h"
#include "tests/support/tensors.h"

namespace collegium {
namespace {

using test::bound;
using test::random_tensor;
using test::relative_difference;

const at::ScalarType kDtypes[] = {at::kDouble, at::kFloat, at::kBFloat16};

TEST(TopK, equals_reference_and_aten_form_with_ties_and_nan) {
  for (const std::int64_t num_columns : {1, 2, 7, 16, 17, 64, 100}) {
    // Few distinct values, zeros of both signs among them: many ties.
    at::Tensor scores = (random_tensor("scores", {300, num_columns}) * 2).round();
    scores[3][0] = std::numeric_limits<double>::quiet_NaN();
    scores[4].fill_(std::numeric_limits<double>::quiet_NaN());
    scores[5].fill_(-std::numeric_limits<double>::infinity());
    for (const std::int64_t k : {std::int64_t{1}, (num_columns + 1) / 2, num_columns}) {
      const at::Tensor ids = ops::topk_stable(scores, k);
      EXPECT_TRUE(at::equal(ids, ops::topk_stable_aten(scores, k))) << num_columns << " " << k;
      EXPECT_TRUE(at::equal(ids, ops::topk_stable(scores.to(at::kFloat), k))) << num_columns << " " << k;
      const auto matrix = test::to_matrix(scores);
      for (std::int64_t row = 0; row < 10; ++row) {
        const std::vector<double> values(matrix.values.begin() + row * num_columns,
                                         matrix.values.begin() + (row + 1) * num_columns);
        const auto expected = ops::reference::topk(values, k);
        for (std::int64_t j = 0; j < k; ++j)
          EXPECT_EQ(ids[row][j].item<int>(), expected[static_cast<std::size_t>(j)]);
      }
    }
  }
}

TEST(ChoiceSums, equal_the_aten_form_and_a_loop) {
  for (const std::int64_t length : {0, 1, 9}) {
    for (const auto dtype : {at::kDouble, at::kFloat}) {
      const at::Tensor ids = (random_tensor("ids", {3 * length, 2}) * 3).round().clamp(-1, 4).to(at::kInt);
      const at::Tensor weights = random_tensor("weights", ids.sizes(), dtype);
      const ops::ChoiceSums ours = ops::sum_choices(ids, weights, 3, 5);
      const ops::ChoiceSums aten = ops::sum_choices_aten(ids, weights, 3, 5);
      EXPECT_TRUE(at::equal(ours.counts_BE, aten.counts_BE));
      EXPECT_TRUE(at::equal(ours.first_counts_BE, aten.first_counts_BE));
      EXPECT_LE(relative_difference(ours.weights_BE, aten.weights_BE), bound(dtype, 2 * length + 1));
      at::Tensor counts = at::zeros({3, 5, 3}, at::kDouble);  // choices, first choices, weights
      for (std::int64_t t = 0; t < 3 * length; ++t) {
        for (std::int64_t k = 0; k < 2; ++k) {
          if (ids[t][k].item<int>() < 0) continue;
          const at::Tensor one =
              at::tensor({1.0, k == 0 ? 1.0 : 0.0, weights[t][k].item<double>()}, at::kDouble);
          counts[t / length][ids[t][k].item<int>()] += one;
        }
      }
      EXPECT_TRUE(at::equal(ours.counts_BE.to(at::kDouble), counts.select(2, 0)));
      EXPECT_TRUE(at::equal(ours.first_counts_BE.to(at::kDouble), counts.select(2, 1)));
      EXPECT_LE(relative_difference(ours.weights_BE, counts.select(2, 2)), bound(dtype, 2 * length + 1));
    }
  }
  EXPECT_EQ(ops::sum_choices(at::empty({0, 2}, at::kInt), at::empty({0, 2}), 0, 5).counts_BE.numel(), 0);
  EXPECT_THROW(ops::sum_choices(at::full({1, 1}, 5, at::kInt), at::ones({1, 1}), 1, 5), InternalError);
}

// T = 3, K = 2, ids {1,0} {-1,1} {0,-1}: expert 0 gets slots 1 and 4, expert 1 gets slots 0 and 3.
TEST(Permutation, hand_worked_example) {
  const at::Tensor ids = at::tensor({1, 0, -1, 1, 0, -1}, at::kInt).view({3, 2});
  for (const auto& p : {ops::group_by_expert(ids, 3), ops::group_by_expert_aten(ids, 3)}) {
    EXPECT_TRUE(at::equal(p.row_slot_R, at::tensor({1, 4, 0, 3}, at::kInt)));
    EXPECT_TRUE(at::equal(p.row_token_R, at::tensor({0, 2, 0, 1}, at::kInt)));
    EXPECT_TRUE(at::equal(p.slot_row_TK, at::tensor({2, 0, -1, 3, 1, -1}, at::kInt).view({3, 2})));
    EXPECT_TRUE(at::equal(p.counts_E, at::tensor({2, 2, 0}, at::kLong)));
  }
}

TEST(Permutation, gather_and_combine_equal_their_aten_forms_and_are_adjoint) {
  for (const auto dtype : kDtypes) {
    for (const std::int64_t num_tokens : {0, 1, 33, 200}) {
      const at::Tensor ids = (random_tensor("ids", {num_tokens, 3}) * 3).round().clamp(-1, 4).to(at::kInt);
      const ops::Permutation p = ops::group_by_expert(ids, 5);
      const at::Tensor x = random_tensor("x", {num_tokens, 19}, dtype);
      const at::Tensor rows = ops::gather_rows(x, p.row_token_R);
      EXPECT_TRUE(at::equal(rows, ops::gather_rows_aten(x, p.row_token_R)));
      const at::Tensor y = ops::combine_rows(rows, p.slot_row_TK);
      EXPECT_TRUE(at::equal(y, ops::combine_rows_aten(rows, p.slot_row_TK)));
      if (dtype != at::kDouble || num_tokens == 0) continue;
      // <gather(x), r> = <x, combine(r)>
      const at::Tensor r = random_tensor("r", rows.sizes());
      const double left = (rows * r).sum().item<double>();
      const double right = (x * ops::combine_rows(r, p.slot_row_TK)).sum().item<double>();
      EXPECT_NEAR(left, right,
                  bound(dtype, rows.numel()) * rows.norm().item<double>() * r.norm().item<double>());
    }
  }
}

// Every number of rows per token, with and without missing ones, in more than one pass over its columns.
TEST(Permutation, combine_adds_any_number_of_rows) {
  for (const auto dtype : kDtypes) {
    for (std::int64_t top_k = 1; top_k <= 9; ++top_k) {
      const at::Tensor ids = (random_tensor("ids", {17, top_k}) * 3).round().clamp(-1, 4).to(at::kInt);
      const ops::Permutation p = ops::group_by_expert(ids, 5);
      const at::Tensor rows = random_tensor("rows", {p.row_token_R.numel(), 1030}, dtype);
      EXPECT_TRUE(
          at::equal(ops::combine_rows(rows, p.slot_row_TK), ops::combine_rows_aten(rows, p.slot_row_TK)))
          << top_k << " rows per token";
    }
  }
}

// Row r of x is r; token -1 is a row of zeros; rows 3 and 4 lie in the second tensor.
TEST(Permutation, zero_rows_and_rows_in_two_places) {
  for (const auto dtype : kDtypes) {
    const at::Tensor x = at::arange(5, at::kDouble).unsqueeze(1).expand({5, 130}).to(dtype).contiguous();
    const at::Tensor tokens = at::tensor({3, -1, 0, 4, -1}, at::kInt);
    const at::Tensor gathered = ops::gather_rows(x, tokens);
    EXPECT_TRUE(at::equal(gathered.select(1, 129), at::tensor({3, 0, 0, 4, 0}, at::kDouble).to(dtype)));
    EXPECT_TRUE(at::equal(gathered, ops::gather_rows_aten(x, tokens)));
    const at::Tensor wide = at::empty(gathered.sizes(), at::kFloat);
    if (dtype == at::kBFloat16) {
      ops::gather_rows_into(x, tokens, wide);
      EXPECT_TRUE(at::equal(wide, gathered.to(at::kFloat)));
    }
    const at::Tensor places = at::tensor({6, 0, 2, 1, 4}, at::kInt);
    const at::Tensor spread = at::full({7, 130}, 9.0, x.options());
    ops::gather_rows_into(x, tokens, places, spread);
    EXPECT_TRUE(at::equal(spread.index_select(0, places), gathered));
    EXPECT_TRUE(at::all(spread[3] == 9.0).item<bool>() && at::all(spread[5] == 9.0).item<bool>());
    const at::Tensor slots = at::tensor({0, 4, 3, 3, -1, 2, -1, -1}, at::kInt).view({4, 2});
    for (const std::int64_t first : {0, 3, 5}) {
      const at::Tensor y = ops::combine_rows(x.narrow(0, 0, first), x.narrow(0, first, 5 - first), slots);
      EXPECT_TRUE(at::equal(y, ops::combine_rows(x, slots))) << first << " rows in the first tensor";
      EXPECT_TRUE(at::equal(y.select(1, 0), at::tensor({4, 6, 2, 0}, at::kDouble).to(dtype)));
    }
    EXPECT_THROW(ops::combine_rows(x, x.narrow(1, 0, 7), slots), InternalError);
  }
}

TEST(Swiglu, forward_and_backward_equal_aten_form_and_autograd) {
  for (const auto dtype : kDtypes) {
    for (const std::int64_t width : {1, 15, 16, 17, 64, 100}) {
      const at::Tensor hidden = random_tensor("hidden", {9, 2 * width}, dtype);
      const at::Tensor grad = random_tensor("grad", {9, width}, dtype);
      for (const bool weighted : {true, false}) {
        const at::Tensor weights =
            weighted ? random_tensor("w", {9}, dtype == at::kDouble ? at::kDouble : at::kFloat)
                     : at::Tensor();
        // Inner math is fp32 on both sides: they differ by its roundings and, in bf16, by one last one.
        const double limit = dtype == at::kBFloat16 ? bound(dtype, 1) : bound(dtype, 16);
        EXPECT_LE(relative_difference(ops::swiglu(hidden, weights), ops::swiglu_aten(hidden, weights)),
                  limit);
        const auto ours = ops::swiglu_backward(grad, hidden, weights);
        const auto aten = ops::swiglu_backward_aten(grad, hidden, weights);
        const at::Tensor again = at::empty_like(grad);
        ops::swiglu_backward_into(grad, hidden, weights, ours, again);
        EXPECT_TRUE(at::equal(again, ops::swiglu(hidden, weights)));
        EXPECT_LE(relative_difference(ours.gate_up_RG, aten.gate_up_RG), limit);
        if (weighted) {
          EXPECT_LE(relative_difference(ours.weights_R, aten.weights_R), bound(at::kFloat, 16 + width));
        }
        if (dtype != at::kDouble) continue;
        const at::Tensor leaf = hidden.clone().requires_grad_(true);
        const auto halves = leaf.chunk(2, 1);
        at::Tensor out = at::silu(halves[0]) * halves[1];
        if (weighted) out = out * weights.unsqueeze(1);
        (out * grad).sum().backward();
        EXPECT_LE(relative_difference(ours.gate_up_RG, leaf.grad()), bound(dtype, 16));
      }
    }
  }
}

TEST(WideLinear, products_equal_those_of_widened_inputs) {
  for (const auto dtype : kDtypes) {
    const auto wide = dtype == at::kDouble ? at::kDouble : at::kFloat;
    for (const std::int64_t rows : {0, 1, 255, 256, 257, 5000}) {
      const at::Tensor x = random_tensor("x", {rows, 20}, dtype);
      const at::Tensor w = random_tensor("w", {7, 20}, wide);
      const at::Tensor g = random_tensor("g", {rows, 7}, wide);
      const at::Tensor share = random_tensor("share", {rows, 20}, dtype);
      const at::Tensor x_wide = x.to(at::kDouble);
      const at::Tensor w_wide = w.to(at::kDouble);
      const at::Tensor g_wide = g.to(at::kDouble);
      EXPECT_LE(relative_difference(ops::wide_linear(x, w), x_wide.mm(w_wide.t())), bound(wide, 20));
      EXPECT_LE(relative_difference(ops::wide_linear_grad_weight(g, x), g_wide.t().mm(x_wide)),
                bound(wide, 5000));
      const double limit = bound(dtype, 1) + bound(wide, 8);
      const at::Tensor dx = ops::wide_linear_grad_input(g, w, share, dtype);
      EXPECT_EQ(dx.scalar_type(), dtype);
      EXPECT_LE(relative_difference(dx, g_wide.mm(w_wide) + share.to(at::kDouble)), limit);
      EXPECT_LE(relative_difference(ops::wide_linear_grad_input(g, w, {}, dtype), g_wide.mm(w_wide)), limit);
    }
  }
}

// Sizes around blocks; rows apart in memory; what lies between them stays.
TEST(Transpose, equals_aten_for_every_size) {
  for (const auto dtype : kDtypes) {
    for (const std::int64_t rows : {0, 1, 15, 16, 31, 32, 33, 64, 71}) {
      for (const std::int64_t columns : {0, 1, 15, 16, 17, 32, 41}) {
        const at::Tensor in = random_tensor("in", {rows, columns + 3}, dtype).narrow(1, 2, columns);
        const at::Tensor all = at::full({columns, rows + 5}, 7.0, dtype);
        const at::Tensor out = all.narrow(1, 1, rows);
        ops::transpose_into(in, out);
        EXPECT_TRUE(at::equal(out, in.t())) << rows << " " << columns;
        const ops::RowSource turned{in, at::arange(rows - 1, -1, -1, at::kInt)};
        ops::transpose_into(turned, out);
        EXPECT_TRUE(at::equal(out, in.flip(0).t())) << rows << " " << columns << " by an index";
        EXPECT_TRUE(at::all(all.narrow(1, rows + 1, 4) == 7.0).item<bool>());
        EXPECT_TRUE(at::all(all.narrow(1, 0, 1) == 7.0).item<bool>());
      }
    }
  }
  EXPECT_THROW(ops::transpose_into(at::ones({2, 3}), at::ones({2, 3})), InternalError);
}

}  // namespace
}  // namespace collegium
