// SPDX-License-Identifier: Apache-2.0

// The router's row kernels against plain loops, ATen, autograd and numerical gradients.

#include "collegium/ops/softmax_rows.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/softmax.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "collegium/base/error.h"
#include "tests/support/tensors.h"

namespace collegium {
namespace {

using test::bound;
using test::random_tensor;
using test::relative_difference;

const at::ScalarType kDtypes[] = {at::kDouble, at::kFloat};
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Roundings on the way to a probability: the logits' difference, whose error exp multiplies by at most
// `range`, exp itself, the sum over the columns and the division.
std::int64_t roundings(std::int64_t num_columns, double range) {
  return num_columns + static_cast<std::int64_t>(range) + 8;
}

TEST(SoftmaxRows, equal_a_loop_and_the_aten_form) {
  for (const auto dtype : kDtypes) {
    for (const std::int64_t num_columns : {1, 2, 7, 16, 17, 64, 100}) {
      for (const std::int64_t num_rows : {0, 1, 127, 300}) {
        const at::Tensor logits = random_tensor("logits", {num_rows, num_columns}, dtype) * 5;
        const ops::SoftmaxRows ours = ops::softmax_rows(logits);
        const ops::SoftmaxRows aten = ops::softmax_rows_aten(logits.to(at::kDouble));
        const double limit = bound(dtype, roundings(num_columns, 50));
        EXPECT_EQ(ours.lse_T1.sizes(), at::IntArrayRef({num_rows, 1}));
        EXPECT_LE(relative_difference(ours.probs_TE, aten.probs_TE), limit);
        EXPECT_LE(relative_difference(ours.lse_T1, aten.lse_T1), limit);
        // log s is absolutely as exact as s is relatively: rows of one large probability have little entropy.
        EXPECT_LE((ours.entropy_T1 - aten.entropy_T1).norm().item<double>(),
                  limit * (aten.entropy_T1.norm().item<double>() + std::sqrt(static_cast<double>(num_rows))));
        const auto matrix = test::to_matrix(logits);
        for (std::int64_t row = 0; row < std::min<std::int64_t>(num_rows, 10); ++row) {
          const std::vector<double> values(matrix.values.begin() + row * num_columns,
                                           matrix.values.begin() + (row + 1) * num_columns);
          const std::vector<double> probs = ops::reference::softmax(values);
          double entropy = 0.0;
          for (std::size_t e = 0; e < probs.size(); ++e) {
            entropy -= probs[e] * std::log(probs[e]);
            EXPECT_NEAR(ours.probs_TE[row][static_cast<std::int64_t>(e)].item<double>(), probs[e], limit);
          }
          EXPECT_NEAR(ours.entropy_T1[row].item<double>(), entropy, limit * 5);
          EXPECT_NEAR(ours.lse_T1[row].item<double>(), values[0] - std::log(probs[0]), limit * 50);
        }
      }
    }
  }
}

TEST(SoftmaxRows, extreme_logits) {
  for (const auto dtype : kDtypes) {
    at::Tensor logits = random_tensor("logits", {5, 36}, dtype);
    logits[0].mul_(1e4);  // one probability is 1
    logits[1][3] = -kInfinity;
    logits[2].fill_(-1e30);
    logits[3][35] = std::numeric_limits<double>::quiet_NaN();
    logits[4][0] = kInfinity;
    const ops::SoftmaxRows rows = ops::softmax_rows(logits);
    EXPECT_EQ(rows.probs_TE[0].max().item<double>(), 1.0);
    EXPECT_EQ(rows.entropy_T1[0].item<double>(), 0.0);
    EXPECT_EQ(rows.probs_TE[1][3].item<double>(), 0.0);
    const at::Tensor others = at::cat({logits[1].narrow(0, 0, 3), logits[1].narrow(0, 4, 32)}).unsqueeze(0);
    EXPECT_LE(relative_difference(rows.entropy_T1[1], ops::softmax_rows_aten(others).entropy_T1[0]),
              bound(dtype, roundings(36, 10)));
    EXPECT_NEAR(rows.entropy_T1[2].item<double>(), std::log(36.0), bound(dtype, 36));
    for (const std::int64_t row : {3, 4}) {
      EXPECT_TRUE(rows.probs_TE[row].isnan().all().item<bool>());
      EXPECT_TRUE(rows.lse_T1[row].isnan().all().item<bool>());
      EXPECT_TRUE(rows.entropy_T1[row].isnan().all().item<bool>());
    }
  }
}

// Every part of the gradient alone and all together; slots repeat a column.
ops::SoftmaxRowsGradient gradient_of(int parts, std::int64_t num_sequences, const at::Tensor& logits) {
  const std::int64_t num_tokens = logits.size(0);
  const std::int64_t num_columns = logits.size(1);
  const auto dtype = logits.scalar_type();
  ops::SoftmaxRowsGradient grad;
  if ((parts & 1) != 0) {
    grad.sequence_BE = random_tensor("sequence", {num_sequences, num_columns}, dtype);
    if ((parts & 2) != 0) grad.valid_T1 = (random_tensor("valid", {num_tokens, 1}) > 0).to(dtype);
  }
  if ((parts & 4) != 0) {
    grad.slot_ids_TK =
        random_tensor("ids", {num_tokens, 3}).mul(4).round().abs().clamp_max(num_columns - 1).to(at::kLong);
    grad.slots_TK = random_tensor("slots", {num_tokens, 3}, dtype);
  }
  if ((parts & 8) != 0) grad.lse_T1 = random_tensor("lse", {num_tokens, 1}, dtype);
  return grad;
}

// The function whose gradient softmax_rows_backward() gives, for autograd and finite differences.
at::Tensor loss_of(const at::Tensor& logits, const ops::SoftmaxRowsGradient& grad) {
  const at::Tensor probs = at::softmax(logits, 1);
  at::Tensor loss = probs.sum() * 0;
  if (grad.sequence_BE.defined()) {
    const std::int64_t length = logits.size(0) / grad.sequence_BE.size(0);
    at::Tensor terms = probs * grad.sequence_BE.repeat_interleave(length, 0);
    if (grad.valid_T1.defined()) terms = terms * grad.valid_T1;
    loss = loss + terms.sum();
  }
  if (grad.slots_TK.defined()) loss = loss + (probs.gather(1, grad.slot_ids_TK) * grad.slots_TK).sum();
  if (grad.lse_T1.defined()) loss = loss + (at::logsumexp(logits, {1}, true) * grad.lse_T1).sum();
  return loss;
}

TEST(SoftmaxRows, backward_equals_autograd_and_the_aten_form) {
  for (const auto dtype : kDtypes) {
    for (const std::int64_t num_columns : {1, 2, 16, 17, 64}) {
      for (const std::int64_t num_tokens : {0, 6, 300}) {
        for (const std::int64_t num_sequences : {1, 3}) {
          for (int parts = 0; parts < 16; ++parts) {
            const at::Tensor logits = random_tensor("logits", {num_tokens, num_columns}, dtype);
            const ops::SoftmaxRowsGradient grad = gradient_of(parts, num_sequences, logits);
            const at::Tensor leaf = logits.to(at::kDouble).requires_grad_(true);
            loss_of(leaf, grad).backward();
            const at::Tensor probs = ops::softmax_rows(logits).probs_TE;
            const double limit = bound(dtype, roundings(num_columns, 10));
            const at::Tensor ours = ops::softmax_rows_backward(probs, grad);
            EXPECT_LE(relative_difference(ours, leaf.grad()), limit) << parts << " " << num_columns;
            EXPECT_LE(relative_difference(ops::softmax_rows_backward_aten(probs, grad), leaf.grad()), limit);
          }
        }
      }
    }
  }
  ops::SoftmaxRowsGradient uneven;
  uneven.sequence_BE = at::ones({2, 2});
  EXPECT_THROW(ops::softmax_rows_backward(at::ones({5, 2}), uneven), InternalError);
}

TEST(SoftmaxRows, backward_equals_central_differences) {
  const at::Tensor logits = random_tensor("logits", {6, 9});
  const ops::SoftmaxRowsGradient grad = gradient_of(15, 3, logits);
  const at::Tensor ours = ops::softmax_rows_backward(ops::softmax_rows(logits).probs_TE, grad);
  constexpr double kStep = 1e-5;  // truncation kStep^2, rounding epsilon / kStep
  for (std::int64_t t = 0; t < 6; ++t) {
    for (std::int64_t e = 0; e < 9; ++e) {
      at::Tensor above = logits.clone();
      at::Tensor below = logits.clone();
      above[t][e] += kStep;
      below[t][e] -= kStep;
      const double slope =
          (loss_of(above, grad).item<double>() - loss_of(below, grad).item<double>()) / (2 * kStep);
      EXPECT_NEAR(ours[t][e].item<double>(), slope, 1e-9);
    }
  }
}

}  // namespace
}  // namespace collegium
