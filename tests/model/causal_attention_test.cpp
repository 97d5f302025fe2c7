// SPDX-License-Identifier: Apache-2.0

// Causal attention and its gradient against the formula in double precision by autograd, around the block of
// 128 queries, with shared key/value heads, and with no sequence.

#include "collegium/model/causal_attention.h"

#include <ATen/Parallel.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/softmax.h>
#include <gtest/gtest.h>

#include "tests/support/tensors.h"

namespace collegium {
namespace {

using test::bound;
using test::random_tensor;
using test::relative_difference;

struct Heads {
  at::Tensor q, k, v, grad;

  Heads(std::int64_t batch, std::int64_t heads, std::int64_t kv_heads, std::int64_t length,
        at::ScalarType dtype) {
    const auto make = [&](const char* name, std::int64_t count) {
      return random_tensor(name, {batch, length, count, 16}, dtype).transpose(1, 2);
    };
    q = make("q", heads).detach().requires_grad_();
    k = make("k", kv_heads).detach().requires_grad_();
    v = make("v", kv_heads).detach().requires_grad_();
    grad = make("grad", heads);
  }
};

// The formula with autograd, in double precision.
Heads oracle(const Heads& of, at::Tensor& out) {
  Heads wide = of;
  for (at::Tensor* t : {&wide.q, &wide.k, &wide.v}) *t = t->detach().to(at::kDouble).requires_grad_();
  const std::int64_t times = of.q.size(1) / of.k.size(1);
  const std::int64_t length = of.q.size(2);
  const at::Tensor k = wide.k.repeat_interleave(times, 1);
  const at::Tensor v = wide.v.repeat_interleave(times, 1);
  const at::Tensor hidden = at::ones({length, length}, at::kBool).tril().logical_not();
  const at::Tensor scores = at::matmul(wide.q, k.transpose(2, 3)) / 4.0;  // sqrt(16)
  out = at::matmul(at::softmax(scores.masked_fill(hidden, -std::numeric_limits<double>::infinity()), 3), v);
  out.backward(of.grad.to(at::kDouble));
  return wide;
}

TEST(CausalAttention, output_and_gradients_equal_the_formula) {
  for (const auto dtype : {at::kDouble, at::kFloat, at::kBFloat16}) {
    for (const std::int64_t length : {2, 127, 128, 129, 300}) {
      for (const std::int64_t kv_heads : {1, 2, 6}) {
        const Heads ours(2, 6, kv_heads, length, dtype);
        const at::Tensor out = model::causal_attention(ours.q, ours.k, ours.v);
        out.backward(ours.grad);
        at::Tensor expected;
        const Heads wide = oracle(ours, expected);
        // Inside, sums of up to 300 terms in fp32; outside, one rounding, and for the gradients that of the
        // output.
        const auto inner = dtype == at::kDouble ? at::kDouble : at::kFloat;
        const double limit = 2 * bound(dtype, 1) + bound(inner, length + 16);
        EXPECT_EQ(out.scalar_type(), dtype);
        EXPECT_LE(relative_difference(out, expected), limit) << length;
        EXPECT_LE(relative_difference(ours.q.grad(), wide.q.grad()), limit) << length;
        EXPECT_LE(relative_difference(ours.k.grad(), wide.k.grad()), limit * 2) << length;
        EXPECT_LE(relative_difference(ours.v.grad(), wide.v.grad()), limit) << length;
      }
    }
  }
}

TEST(CausalAttention, no_sequence_gives_empty_results) {
  const Heads none(0, 2, 1, 8, at::kFloat);
  const at::Tensor out = model::causal_attention(none.q, none.k, none.v);
  EXPECT_EQ(out.sizes(), (std::vector<std::int64_t>{0, 2, 8, 16}));
  out.backward(none.grad);
  EXPECT_EQ(none.k.grad().numel(), 0);
}

TEST(CausalAttention, large_scores_neither_overflow_nor_lose_the_largest) {
  const Heads h(1, 1, 1, 40, at::kFloat);
  const at::Tensor out = model::causal_attention(h.q.detach() * 1e4, h.k.detach() * 1e4, h.v.detach());
  EXPECT_TRUE(at::isfinite(out).all().item<bool>());
  EXPECT_TRUE(at::equal(out.select(2, 0), h.v.select(2, 0)));
}

TEST(CausalAttention, results_do_not_depend_on_threads) {
  const int threads = at::get_num_threads();
  // Several tasks, and one that has all threads.
  for (const auto& [sequences, key_heads] : {std::pair{2, 2}, {1, 1}}) {
    std::vector<Heads> results;
    for (const int count : {1, 2, 3}) {
      at::set_num_threads(count);
      const Heads& h = results.emplace_back(sequences, 4, key_heads, 200, at::kFloat);
      model::causal_attention(h.q, h.k, h.v).backward(h.grad);
      EXPECT_TRUE(at::equal(h.q.grad(), results.front().q.grad())) << count << " threads";
      EXPECT_TRUE(at::equal(h.k.grad(), results.front().k.grad())) << count << " threads";
      EXPECT_TRUE(at::equal(h.v.grad(), results.front().v.grad())) << count << " threads";
    }
  }
  at::set_num_threads(threads);
}

}  // namespace
}  // namespace collegium
