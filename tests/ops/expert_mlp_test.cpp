// SPDX-License-Identifier: Apache-2.0

// The experts' grouped products and how their rows are cut, against products in double precision, the
// plain-loop reference and the ATen form, for loads around every cut: no rows, one, a step more or less, one
// expert with all.

#include "collegium/ops/expert_mlp.h"

#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include "collegium/ops/expert_tasks.h"
#include "tests/support/tensors.h"

namespace collegium {
namespace {

using test::bound;
using test::random_tensor;
using test::relative_difference;

const at::ScalarType kDtypes[] = {at::kDouble, at::kFloat, at::kBFloat16};
const std::vector<std::vector<std::int64_t>> kLoads = {
    {0, 0, 0}, {1, 0, 0}, {0, 600, 0}, {31, 32, 33}, {255, 256, 257}, {511, 512, 513}, {7, 65, 300}};

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

TEST(ExpertTasks, pieces_cover_every_row_once_and_gemms_cover_every_piece) {
  for (const auto& load : kLoads) {
    const at::Tensor counts = at::tensor(load, at::kLong);
    const std::int64_t most_rows = ops::gemm_rows(counts.sum().item<std::int64_t>());
    const auto pieces = ops::cut_rows(counts);
    std::int64_t next = 0;
    for (const ops::ExpertRows& piece : pieces) {
      EXPECT_EQ(piece.begin, next);
      EXPECT_GT(piece.rows, 0);
      EXPECT_LT(piece.rows, 2 * most_rows);
      next += piece.rows;
      for (const auto dtype : kDtypes) {
        std::int64_t reached = piece.begin;
        for (const ops::ExpertRows& gemm : ops::gemms_of(piece, most_rows, dtype)) {
          EXPECT_EQ(gemm.expert, piece.expert);
          EXPECT_LE(gemm.begin, reached);
          EXPECT_GE(gemm.begin, piece.begin);
          EXPECT_GT(gemm.begin + gemm.rows, reached);
          if (dtype == at::kBFloat16 && piece.rows >= ops::kSizeStep) {
            EXPECT_EQ(gemm.rows % ops::kSizeStep, 0);
          }
          reached = gemm.begin + gemm.rows;
        }
        EXPECT_EQ(reached, piece.begin + piece.rows);
      }
    }
    EXPECT_EQ(next, counts.sum().item<std::int64_t>());
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

// Inner results are rounded to the dtype on both sides, each sum differs by its own roundings.
double limit(at::ScalarType dtype, std::int64_t length) {
  return 4 * bound(dtype, 1) + bound(inner(dtype), length);
}

TEST(ExpertMlp, forward_and_backward_equal_the_aten_form) {
  for (const auto dtype : kDtypes) {
    for (const auto& load : kLoads) {
      for (const std::int64_t width : {1, 15, 40}) {
        const Case c(dtype, load, width);
        at::Tensor gate_up;
        at::Tensor gate_up_aten;
        const at::Tensor y = ops::expert_mlp(c.x, c.weights, c.counts, c.experts, gate_up);
        const at::Tensor y_aten = ops::expert_mlp_aten(c.x, c.weights, c.counts, c.experts, gate_up_aten);
        EXPECT_LE(relative_difference(gate_up, gate_up_aten), limit(dtype, 12));
        EXPECT_LE(relative_difference(y, y_aten), limit(dtype, width + 12));
        const auto ours = ops::expert_mlp_grad_rows(c.grad, gate_up, c.weights, c.counts, c.experts, {});
        const auto aten = ops::expert_mlp_grad_rows_aten(c.grad, gate_up, c.weights, c.counts, c.experts, {});
        EXPECT_LE(relative_difference(ours.x_RD, aten.x_RD), limit(dtype, 2 * width + 12));
        EXPECT_LE(relative_difference(ours.gate_up_RG, aten.gate_up_RG), limit(dtype, 12));
        EXPECT_LE(relative_difference(ours.activation_RF, aten.activation_RF), limit(dtype, 16));
        EXPECT_LE(relative_difference(ours.weights_R, aten.weights_R), limit(dtype, width + 12));
      }
    }
  }
}

TEST(ExpertMlp, rows_equal_the_plain_loop) {
  const Case c(at::kDouble, {3, 0, 40}, 15);
  at::Tensor gate_up;
  const at::Tensor y = ops::expert_mlp(c.x, c.weights, c.counts, c.experts, gate_up);
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

TEST(ExpertMlp, weights_may_be_absent_and_unneeded_gradients_are) {
  const Case c(at::kFloat, {40, 300, 0}, 8);
  at::Tensor gate_up;
  at::Tensor with_ones;
  const at::Tensor y = ops::expert_mlp(c.x, {}, c.counts, c.experts, gate_up);
  EXPECT_TRUE(
      at::equal(y, ops::expert_mlp(c.x, at::ones({340}, at::kFloat), c.counts, c.experts, with_ones)));
  const auto gradients =
      ops::expert_mlp_grad_rows(c.grad, gate_up, {}, c.counts, c.experts, {.x = false, .activation = false});
  EXPECT_FALSE(gradients.x_RD.defined());
  EXPECT_FALSE(gradients.weights_R.defined());
  EXPECT_FALSE(gradients.activation_RF.defined());
  EXPECT_TRUE(gradients.gate_up_RG.defined());
}

TEST(GroupedOuter, equals_one_product_per_expert) {
  for (const auto dtype : kDtypes) {
    for (const auto& load : kLoads) {
      const Case c(dtype, load, 10);
      const at::Tensor g = random_tensor("outer", {c.x.size(0), 10}, dtype);
      const at::Tensor dw = ops::grouped_outer(g, c.x, c.counts);
      EXPECT_LE(relative_difference(dw, ops::grouped_outer_aten(g, c.x, c.counts)), limit(dtype, 600));
      for (const ops::ExpertRows& rows : ops::rows_of_experts(c.counts)) {
        const at::Tensor x = c.x.narrow(0, rows.begin, rows.rows).to(at::kDouble);
        const at::Tensor expected = g.narrow(0, rows.begin, rows.rows).to(at::kDouble).t().mm(x);
        EXPECT_LE(relative_difference(dw[rows.expert], expected), bound(dtype, 1) + bound(inner(dtype), 600));
        if (rows.rows == 0) {
          EXPECT_EQ(dw[rows.expert].abs().sum().item<double>(), 0.0);
        }
      }
    }
  }
}

TEST(ExpertMlp, results_do_not_depend_on_threads) {
  const Case c(at::kBFloat16, {511, 1, 300}, 24);
  const int threads = at::get_num_threads();
  std::vector<at::Tensor> results;
  for (const int count : {1, 2, 3}) {
    at::set_num_threads(count);
    at::Tensor gate_up;
    results.push_back(ops::expert_mlp(c.x, c.weights, c.counts, c.experts, gate_up));
    EXPECT_TRUE(at::equal(results.front(), results.back()));
  }
  at::set_num_threads(threads);
}

}  // namespace
}  // namespace collegium
