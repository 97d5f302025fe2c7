// SPDX-License-Identifier: Apache-2.0

// The experts' grouped products and how their rows are cut, against products in double precision, the
// plain-loop reference and the ATen form, for loads around every cut: no rows, one, a step more or less, one
// expert with all.

#include "collegium/ops/expert_mlp.h"

#include <ATen/Parallel.h>
#include <ATen/ops/all.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/full.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include "collegium/base/error.h"
#include "collegium/ops/expert_tasks.h"
#include "collegium/ops/product.h"
#include "collegium/ops/weight_gradients.h"
#include "tests/support/product_ways.h"
#include "tests/support/tensors.h"

namespace collegium {
namespace {

using test::bound;
using test::random_tensor;
using test::relative_difference;

const at::ScalarType kDtypes[] = {at::kDouble, at::kFloat, at::kBFloat16};
const std::vector<std::vector<std::int64_t>> kLoads = {{0, 0, 0},    {1, 0, 0},       {0, 600, 0},
                                                       {31, 32, 33}, {255, 256, 257}, {511, 512, 513},
                                                       {7, 65, 300}, {3, 1100, 40},   {1100, 0, 1057}};

// Every way of multiplying, whatever this machine has.
class ExpertMlp : public testing::TestWithParam<ops::ProductWays> {
 private:
  test::AssumeProductWays assume_{GetParam()};
};
INSTANTIATE_TEST_SUITE_P(Ways, ExpertMlp, testing::ValuesIn(ops::kAllProductWays));

at::ScalarType inner(at::ScalarType dtype) { return dtype == at::kDouble ? at::kDouble : at::kFloat; }

struct Case {
  at::ScalarType dtype;
  at::Tensor counts;
  at::Tensor x, weights, grad;
  ops::ExpertWeights experts;

  Case(at::ScalarType type, const std::vector<std::int64_t>& load, std::int64_t width)
      : dtype(type), counts(at::tensor(load, at::kLong)) {
    const std::int64_t rows = counts.sum().item<std::int64_t>();
    x = random_tensor("x", {rows, 12}, type);
    weights = random_tensor("w", {rows}, inner(type));
    grad = random_tensor("g", {rows, 12}, type);
    experts = {.gate_up_EGD = random_tensor("gate_up", {3, 2 * width, 12}, type),
               .down_EDF = random_tensor("down", {3, 12, width}, type)};
  }
};

TEST_P(ExpertMlp, pieces_cover_every_row_once_and_gemms_cover_every_piece) {
  for (const auto dtype : kDtypes) {
    for (const auto& load : kLoads) {
      const at::Tensor counts = at::tensor(load, at::kLong);
      const std::int64_t most_rows = ops::gemm_rows(counts.sum().item<std::int64_t>(), dtype);
      std::int64_t next = 0;
      for (const ops::ExpertRows& piece : ops::cut_rows(counts, dtype)) {
        EXPECT_EQ(piece.begin, next);
        EXPECT_GT(piece.rows, 0);
        EXPECT_LT(piece.rows, 2 * most_rows);
        next += piece.rows;
        std::int64_t reached = piece.begin;
        for (const ops::ExpertRows& gemm : ops::gemms_of(piece, most_rows, dtype)) {
          EXPECT_EQ(gemm.expert, piece.expert);
          EXPECT_LE(gemm.begin, reached);
          EXPECT_GE(gemm.begin, piece.begin);
          EXPECT_GT(gemm.begin + gemm.rows, reached);
          if (dtype == at::kBFloat16 && !ops::product_ways().blocks && piece.rows >= ops::kSizeStep) {
            EXPECT_EQ(gemm.rows % ops::kSizeStep, 0);
          }
          reached = gemm.begin + gemm.rows;
        }
        EXPECT_EQ(reached, piece.begin + piece.rows);
      }
      EXPECT_EQ(next, counts.sum().item<std::int64_t>());
    }
  }
}

TEST(ExpertTasks, more_rows_make_larger_pieces_within_bounds) {
  for (const auto dtype : kDtypes) {
    EXPECT_EQ(ops::gemm_rows(0, dtype), 256);
    EXPECT_EQ(ops::gemm_rows(std::int64_t{1} << 20, dtype), ops::kMostGemmRows);
  }
  EXPECT_EQ(ops::gemm_rows(4800, at::kFloat), 288);
  for (const auto ways : ops::kAllProductWays) {
    const test::AssumeProductWays assume(ways);
    const std::int64_t pieces = ways.blocks ? 16 : 64;
    EXPECT_EQ(ops::gemm_rows(pieces * 300, at::kBFloat16), 288);
  }
}

TEST(ExpertTasks, every_task_runs_once_for_any_number_of_threads) {
  const int threads = at::get_num_threads();
  for (const int count : {1, 2, 3}) {
    at::set_num_threads(count);
    for (const std::int64_t tasks : {0, 1, 2, 100}) {
      std::vector<std::atomic<int>> runs(static_cast<std::size_t>(tasks));
      ops::run_tasks(tasks, [&](std::int64_t task, std::int64_t worker) {
        EXPECT_LT(worker, count);
        ++runs[static_cast<std::size_t>(task)];
      });
      for (const auto& run : runs) EXPECT_EQ(run, 1);
    }
  }
  at::set_num_threads(threads);
}

// The gradients by products in double precision, from the same kept values.
struct Expected {
  at::Tensor x_RD, weights_R, gate_up_EGD, down_EDF;

  Expected(const Case& c, const at::Tensor& gate_up_RG) {
    const auto d = [](const at::Tensor& t) { return t.to(at::kDouble); };
    const std::int64_t width = c.experts.down_EDF.size(2);
    x_RD = at::zeros(c.x.sizes(), at::kDouble);
    weights_R = at::zeros(c.weights.sizes(), at::kDouble);
    gate_up_EGD = at::zeros(c.experts.gate_up_EGD.sizes(), at::kDouble);
    down_EDF = at::zeros(c.experts.down_EDF.sizes(), at::kDouble);
    for (const ops::ExpertRows& rows : ops::rows_of_experts(c.counts)) {
      const at::Tensor gate = d(rows.of(gate_up_RG)).narrow(1, 0, width);
      const at::Tensor up = d(rows.of(gate_up_RG)).narrow(1, width, width);
      const at::Tensor weight = d(rows.of(c.weights)).unsqueeze(1);
      const at::Tensor sigmoid = at::sigmoid(gate);
      const at::Tensor inner = d(rows.of(c.grad)).mm(d(c.experts.down_EDF[rows.expert]));
      const at::Tensor grad_gate_up = at::cat(
          {weight * inner * up * sigmoid * (1 + gate * (1 - sigmoid)), weight * inner * gate * sigmoid}, 1);
      rows.of(weights_R).copy_((inner * gate * sigmoid * up).sum(1));
      rows.of(x_RD).copy_(grad_gate_up.mm(d(c.experts.gate_up_EGD[rows.expert])));
      gate_up_EGD[rows.expert].copy_(grad_gate_up.t().mm(d(rows.of(c.x))));
      down_EDF[rows.expert].copy_(d(rows.of(c.grad)).t().mm(weight * gate * sigmoid * up));
    }
  }
};

// Inner results are rounded to the dtype on both sides, each sum differs by its own roundings.
double limit(at::ScalarType dtype, std::int64_t length) {
  return 4 * bound(dtype, 1) + bound(inner(dtype), length);
}

struct Gradients {
  ops::ExpertRowGradients rows;
  ops::ExpertWeightGradients weights;
};

Gradients backward_of(const ops::ExpertsKept& kept, const Case& c, ops::WeightGradients when,
                      const ops::ExpertNeeds& needs = {}) {
  ops::ExpertMlpBackward backward(kept, c.experts, c.grad, needs);
  Gradients all;
  all.rows = backward.rows(when);
  all.weights = backward.weights();
  return all;
}

TEST_P(ExpertMlp, forward_and_backward_equal_the_products_in_double_precision) {
  for (const auto dtype : kDtypes) {
    for (const auto& load : kLoads) {
      for (const std::int64_t width : {1, 15, 40}) {
        const Case c(dtype, load, width);
        ops::ExpertsKept kept;
        ops::ExpertsKept kept_aten;
        const at::Tensor y = ops::expert_mlp(c.x, c.weights, c.counts, c.experts, kept);
        const at::Tensor y_aten = ops::expert_mlp_aten(c.x, c.weights, c.counts, c.experts, kept_aten);
        EXPECT_LE(relative_difference(kept.gate_up_RG, kept_aten.gate_up_RG), limit(dtype, 12));
        EXPECT_LE(relative_difference(y, y_aten), limit(dtype, width + 12));
        const Gradients ours = backward_of(kept, c, ops::WeightGradients::kWithRows);
        const Expected expected(c, kept.gate_up_RG);
        EXPECT_LE(relative_difference(ours.rows.x_RD, expected.x_RD), limit(dtype, 2 * width + 12));
        EXPECT_LE(relative_difference(ours.rows.weights_R, expected.weights_R), limit(dtype, width + 12));
        EXPECT_LE(relative_difference(ours.weights.down_EDF, expected.down_EDF), limit(dtype, 600 + 16));
        EXPECT_LE(relative_difference(ours.weights.gate_up_EGD, expected.gate_up_EGD),
                  limit(dtype, 600 + 12));
      }
    }
  }
}

// Bit by bit: when the weights' gradients are computed, and whether rows lie apart or are gathered.
TEST_P(ExpertMlp, neither_the_time_of_weight_gradients_nor_the_place_of_rows_matters) {
  for (const auto dtype : kDtypes) {
    for (const auto& load : kLoads) {
      Case c(dtype, load, 40);
      const std::int64_t rows = c.x.size(0);
      // Some rows several times, some never.
      const at::Tensor index_R =
          at::arange(rows, at::kInt).mul(7).remainder(std::max(rows / 2, std::int64_t{1}));
      const ops::RowSource x{c.x.clone(), index_R};
      const ops::RowSource grad{c.grad.clone(), index_R};
      c.x = x.tensor();
      c.grad = grad.tensor();
      ops::ExpertsKept kept;
      ops::ExpertsKept kept_gathered;
      const at::Tensor y = ops::expert_mlp(c.x, c.weights, c.counts, c.experts, kept);
      EXPECT_TRUE(at::equal(y, ops::expert_mlp(x, c.weights, c.counts, c.experts, kept_gathered)));
      const Gradients first = backward_of(kept, c, ops::WeightGradients::kAfterRows);
      for (const auto when : {ops::WeightGradients::kAfterRows, ops::WeightGradients::kWithRows}) {
        for (const bool gathered : {false, true}) {
          ops::ExpertMlpBackward backward(gathered ? kept_gathered : kept, c.experts,
                                          gathered ? grad : ops::RowSource(c.grad), {});
          const ops::ExpertRowGradients of_rows = backward.rows(when);
          const ops::ExpertWeightGradients of_weights = backward.weights();
          EXPECT_TRUE(at::equal(of_rows.x_RD, first.rows.x_RD));
          EXPECT_TRUE(at::equal(of_rows.weights_R, first.rows.weights_R));
          EXPECT_TRUE(at::equal(of_weights.gate_up_EGD, first.weights.gate_up_EGD));
          EXPECT_TRUE(at::equal(of_weights.down_EDF, first.weights.down_EDF));
        }
      }
    }
  }
}

TEST_P(ExpertMlp, rows_equal_the_plain_loop) {
  const Case c(at::kDouble, {3, 0, 40}, 15);
  ops::ExpertsKept kept;
  const at::Tensor y = ops::expert_mlp(c.x, c.weights, c.counts, c.experts, kept);
  for (std::int64_t row = 0; row < 43; ++row) {
    const std::int64_t expert = row < 3 ? 0 : 2;
    const auto x = test::to_matrix(c.x.narrow(0, row, 1)).values;
    const auto expected = ops::reference::expert(test::to_matrix(c.experts.gate_up_EGD[expert]),
                                                 test::to_matrix(c.experts.down_EDF[expert]), x);
    for (std::int64_t d = 0; d < 12; ++d) {
      EXPECT_NEAR(y[row][d].item<double>(),
                  c.weights[row].item<double>() * expected[static_cast<std::size_t>(d)],
                  bound(at::kDouble, 40) * 100.0);  // sums of 12 and 15 terms below 10
    }
  }
}

TEST_P(ExpertMlp, weights_may_be_absent_and_unneeded_gradients_are) {
  const Case c(at::kFloat, {40, 300, 0}, 8);
  ops::ExpertsKept kept;
  ops::ExpertsKept with_ones;
  const at::Tensor y = ops::expert_mlp(c.x, {}, c.counts, c.experts, kept);
  EXPECT_TRUE(
      at::equal(y, ops::expert_mlp(c.x, at::ones({340}, at::kFloat), c.counts, c.experts, with_ones)));
  for (const auto when : {ops::WeightGradients::kAfterRows, ops::WeightGradients::kWithRows}) {
    const Gradients gradients = backward_of(kept, c, when, {.rows = false, .gate_up = true, .down = false});
    EXPECT_FALSE(gradients.rows.x_RD.defined());
    EXPECT_FALSE(gradients.rows.weights_R.defined());
    EXPECT_FALSE(gradients.weights.down_EDF.defined());
    EXPECT_EQ(gradients.weights.gate_up_EGD[2].abs().sum().item<double>(), 0.0);
    EXPECT_GT(gradients.weights.gate_up_EGD[1].abs().sum().item<double>(), 0.0);
  }
}

TEST_P(ExpertMlp, weight_gradients_equal_one_product_per_expert) {
  for (const auto dtype : kDtypes) {
    for (const auto& load : kLoads) {
      const Case c(dtype, load, 10);
      const at::Tensor g = random_tensor("outer", {c.x.size(0), 10}, dtype);
      const auto experts = ops::rows_of_experts(c.counts);
      const at::Tensor dw = at::full({3, 10, 12}, 7.0, g.options());
      const at::Tensor dw_aten = at::full({3, 10, 12}, 7.0, g.options());
      const ops::PaddedRows padded(experts, c.x);
      ops::outer_into(padded.experts(), {{padded.ordered(g), padded.ordered(c.x), dw}});
      ops::outer_into_aten(experts, {{g, c.x, dw_aten}});
      EXPECT_LE(relative_difference(dw, dw_aten), limit(dtype, 600));
      for (const ops::ExpertRows& rows : experts) {
        const at::Tensor x = rows.of(c.x).to(at::kDouble);
        const at::Tensor expected = rows.of(g).to(at::kDouble).t().mm(x);
        EXPECT_LE(relative_difference(dw[rows.expert], expected), bound(dtype, 1) + bound(inner(dtype), 600));
        if (rows.rows == 0) {
          EXPECT_EQ(dw[rows.expert].abs().sum().item<double>(), 0.0);
        }
      }
    }
  }
}

// So many multiply-adds that an expert's gradient is cut into tiles, the last of another height.
TEST_P(ExpertMlp, weight_gradients_in_tiles_equal_one_product) {
  constexpr std::int64_t kRows = 512;
  constexpr std::int64_t kOut = 2056;
  constexpr std::int64_t kIn = 512;
  const std::vector<ops::ExpertRows> experts = {{.expert = 0, .begin = 0, .rows = kRows},
                                                {.expert = 2, .begin = kRows, .rows = kRows}};
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    const at::Tensor g = random_tensor("g", {2 * kRows, kOut}, dtype);
    const at::Tensor x = random_tensor("x", {2 * kRows, kIn}, dtype);
    const at::Tensor dw = at::full({3, kOut, kIn}, 7.0, g.options());
    ops::outer_into(experts, {{g, x, dw}});
    if (ops::products_take_index(g)) {
      const at::Tensor turned = at::arange(2 * kRows - 1, -1, -1, at::kInt);
      const at::Tensor again = at::full_like(dw, 7.0);
      ops::outer_into(experts, {{{g.flip(0), turned}, {x.flip(0), turned}, again}});
      EXPECT_TRUE(at::equal(again, dw));
    }
    for (const ops::ExpertRows& rows : experts) {
      const at::Tensor expected = rows.of(g).to(at::kDouble).t().mm(rows.of(x).to(at::kDouble));
      EXPECT_LE(relative_difference(dw[rows.expert], expected), bound(dtype, 1) + bound(inner(dtype), kRows));
    }
    EXPECT_TRUE(at::all(dw[1] == 7.0).item<bool>());
  }
}

// In fp32 there is no padding; where products take an index, rows stay where they are.
TEST_P(ExpertMlp, rows_of_some_experts_keep_their_order_in_fp32) {
  const at::Tensor x = random_tensor("x", {100, 6}, at::kFloat);
  const ops::RowSource source{x, at::arange(99, -1, -1, at::kInt)};
  const ops::PaddedRows some({{.expert = 1, .begin = 5, .rows = 40}, {.expert = 4, .begin = 60, .rows = 9}},
                             x);
  const ops::RowSource found = some.ordered(source);
  const at::Tensor all = source.tensor();
  EXPECT_EQ(found.index_R.defined(), ops::products_take_index(x));
  EXPECT_TRUE(at::equal(found.tensor(), at::cat({all.narrow(0, 5, 40), all.narrow(0, 60, 9)})));
  EXPECT_EQ(ops::PaddedRows({}, x).ordered(source).rows(), 0);
}

TEST_P(ExpertMlp, an_index_of_no_row_is_refused) {
  const Case c(at::kFloat, {7, 65, 300}, 8);
  ops::ExpertsKept kept;
  for (const int first : {-1, 1}) {  // the last one is a row too far
    const at::Tensor index_R = at::arange(first, first + c.x.size(0), at::kInt);
    EXPECT_THROW(ops::expert_mlp({c.x, index_R}, c.weights, c.counts, c.experts, kept), InternalError);
  }
}

TEST_P(ExpertMlp, padded_rows_are_found_again) {
  const std::vector<ops::ExpertRows> experts = {{.expert = 1, .begin = 5, .rows = 40},
                                                {.expert = 3, .begin = 60, .rows = 0},
                                                {.expert = 4, .begin = 60, .rows = 33}};
  const at::Tensor x = random_tensor("x", {100, 6}, at::kBFloat16);
  const at::Tensor index = at::arange(99, -1, -1, at::kInt);
  const ops::PaddedRows padded(experts, x);
  for (const ops::RowSource& source : {ops::RowSource{x}, ops::RowSource{x, index}}) {
    const at::Tensor copy = padded.ordered(source).tensor();
    ASSERT_EQ(copy.size(0), padded.total());
    double sum = 0.0;
    for (const ops::ExpertRows& rows : experts) {
      EXPECT_TRUE(at::equal(padded.of(rows).of(copy), rows.of(source.tensor())));
      sum += rows.of(source.tensor()).to(at::kDouble).abs().sum().item<double>();
    }
    EXPECT_NEAR(copy.to(at::kDouble).abs().sum().item<double>(), sum, 1e-9);  // and zeros between them
  }
  // As many rows as it pads to, but the last ones are another expert's.
  const ops::PaddedRows alone({{.expert = 0, .begin = 0, .rows = 70}}, x);
  if (!ops::product_ways().widen_bf16) {
    const at::Tensor copy = alone.ordered(x.narrow(0, 0, 96)).tensor();
    EXPECT_EQ(copy.narrow(0, 70, 26).abs().sum().item<double>(), 0.0);
  }
  EXPECT_THROW(padded.of({.expert = 2, .begin = 50, .rows = 1}), InternalError);
}

// Weights of more values than a worker keeps copies of.
TEST_P(ExpertMlp, experts_too_large_to_copy_equal_float64) {
  constexpr std::int64_t kHidden = 8;
  constexpr std::int64_t kLarge = ops::kMostWidened / kHidden / 2 + 8;
  const at::Tensor x = random_tensor("x", {3, kHidden}, at::kBFloat16);
  const at::Tensor column = random_tensor("w", {2 * kLarge, 1}, at::kBFloat16);
  const ops::ExpertWeights experts{
      .gate_up_EGD = column.expand({2 * kLarge, kHidden}).contiguous().unsqueeze(0),
      .down_EDF = column.narrow(0, 0, kLarge).t().expand({kHidden, kLarge}).contiguous().unsqueeze(0)};
  const at::Tensor counts = at::tensor({3}, at::kLong);
  ops::ExpertsKept kept;
  const at::Tensor y = ops::expert_mlp(x, {}, counts, experts, kept);
  const at::Tensor gate_up = kept.gate_up_RG.to(at::kDouble);
  EXPECT_LE(
      relative_difference(kept.gate_up_RG, x.to(at::kDouble).mm(experts.gate_up_EGD[0].to(at::kDouble).t())),
      limit(at::kBFloat16, kHidden));
  const at::Tensor activation = at::silu(gate_up.narrow(1, 0, kLarge)) * gate_up.narrow(1, kLarge, kLarge);
  EXPECT_LE(relative_difference(y, activation.mm(experts.down_EDF[0].to(at::kDouble).t())),
            limit(at::kBFloat16, kLarge));
}

TEST_P(ExpertMlp, results_do_not_depend_on_threads) {
  const Case c(at::kBFloat16, {511, 1, 300}, 24);
  const int threads = at::get_num_threads();
  std::vector<std::vector<at::Tensor>> results;
  for (const int count : {1, 2, 3}) {
    at::set_num_threads(count);
    ops::ExpertsKept kept;
    const at::Tensor y = ops::expert_mlp(c.x, c.weights, c.counts, c.experts, kept);
    const Gradients g = backward_of(kept, c, ops::WeightGradients::kWithRows);
    results.push_back({y, g.rows.x_RD, g.rows.weights_R, g.weights.gate_up_EGD, g.weights.down_EDF});
    for (std::size_t i = 0; i < results[0].size(); ++i)
      EXPECT_TRUE(at::equal(results.front()[i], results.back()[i])) << "result " << i;
  }
  at::set_num_threads(threads);
}

}  // namespace
}  // namespace collegium
