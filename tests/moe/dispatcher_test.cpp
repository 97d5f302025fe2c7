// SPDX-License-Identifier: Apache-2.0

// Every dispatcher against the local one on the tokens of all ranks: the four arrows, that each backward
// arrow is the transpose of its forward, and hand-worked rows of two_level.

#include "collegium/moe/dispatcher.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/repeat_interleave.h>
#include <ATen/ops/tensor.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/moe/dispatcher_cases.h"
#include "tests/moe/dispatcher_layouts.h"
#include "tests/support/tensors.h"

namespace collegium {
namespace {

using test::random_tensor;
using test::RoutingCase;

constexpr std::int64_t kWidth = 6;

// A rank's part of the problem.
struct Tokens {
  at::Tensor ids_TK;
  at::Tensor x_TD;
  at::Tensor weights_TK;  // zero where there is no expert
  at::Tensor grad_y_TD;
};

Tokens tokens_of(const RoutingCase& routing, int rank, int num_ranks, at::ScalarType dtype) {
  const std::string name = std::to_string(rank);
  Tokens tokens{.ids_TK = routing.ids_TK(rank, num_ranks), .x_TD = {}, .weights_TK = {}, .grad_y_TD = {}};
  const std::int64_t count = tokens.ids_TK.size(0);
  const at::ScalarType router_dtype = dtype == at::kDouble ? at::kDouble : at::kFloat;
  tokens.x_TD = random_tensor("x" + name, {count, kWidth}, dtype);
  tokens.grad_y_TD = random_tensor("g" + name, {count, kWidth}, dtype);
  tokens.weights_TK =
      random_tensor("w" + name, tokens.ids_TK.sizes(), router_dtype).masked_fill_(tokens.ids_TK.lt(0), 0.0);
  return tokens;
}

Tokens tokens_of_all(const RoutingCase& routing, int num_ranks, at::ScalarType dtype) {
  std::vector<at::Tensor> ids, x, weights, grad_y;
  for (int rank = 0; rank < num_ranks; ++rank) {
    const Tokens tokens = tokens_of(routing, rank, num_ranks, dtype);
    ids.push_back(tokens.ids_TK);
    x.push_back(tokens.x_TD);
    weights.push_back(tokens.weights_TK);
    grad_y.push_back(tokens.grad_y_TD);
  }
  return {.ids_TK = at::cat(ids),
          .x_TD = at::cat(x),
          .weights_TK = at::cat(weights),
          .grad_y_TD = at::cat(grad_y)};
}

// Expert e computes w (a_e x + b_e): what comes out tells which expert saw which row with which weight.
struct Experts {
  at::Tensor scale_R1;
  at::Tensor shift_R1;

  Experts(std::int64_t first, const at::Tensor& row_counts_L, at::ScalarType dtype) {
    const at::Tensor ids_L = at::arange(first, first + row_counts_L.numel(), at::kLong);
    const at::Tensor ids_R1 = at::repeat_interleave(ids_L, row_counts_L).unsqueeze(1);
    scale_R1 = (1.0 + 0.25 * ids_R1).to(dtype);
    shift_R1 = (0.5 * ids_R1 - 1.0).to(dtype);
  }
  at::Tensor inner(const at::Tensor& rows_RD) const { return scale_R1 * rows_RD + shift_R1; }
};

struct Results {
  at::Tensor y_TD;
  at::Tensor grad_x_TD;
  at::Tensor grad_weights_TK;
  at::Tensor y_magnitude_TD;  // sums of the rows' absolute values: what rounding errors are relative to
  at::Tensor grad_x_magnitude_TD;
};

// All arrows of one chunk, on tokens [begin, begin + count) of this rank.
Results run_chunk(moe::Dispatcher& dispatcher, const std::shared_ptr<moe::DispatchHandle>& handle,
                  const Tokens& tokens, std::int64_t first_expert) {
  const at::ScalarType dtype = tokens.x_TD.scalar_type();
  const auto rows = dispatcher.dispatch(tokens.x_TD, tokens.weights_TK, handle).wait();
  EXPECT_EQ(rows.rows.tensor().size(0), handle->row_counts_L.sum().item<std::int64_t>());
  const Experts experts(first_expert, handle->row_counts_L, dtype);
  const at::Tensor inner_RD = experts.inner(rows.rows.tensor());
  const at::Tensor weights_R1 = rows.weights_R.unsqueeze(1).to(dtype);
  const at::Tensor out_RD = weights_R1 * inner_RD;
  const at::Tensor grad_RD = dispatcher.combine_backward(tokens.grad_y_TD, handle).wait().tensor();
  const at::Tensor grad_rows_RD = weights_R1 * experts.scale_R1 * grad_RD;
  const at::Tensor grad_weights_R = (grad_RD * inner_RD).sum(1).to(rows.weights_R.scalar_type());
  const auto gradients = dispatcher.dispatch_backward(grad_rows_RD, grad_weights_R, handle).wait();
  const auto without_x = dispatcher.dispatch_backward({}, grad_weights_R, handle).wait();
  EXPECT_FALSE(without_x.x_TD.defined());
  EXPECT_TRUE(at::equal(without_x.weights_TK, gradients.weights_TK));
  const at::Tensor placed_RD = dispatcher.result_rows(out_RD, handle).copy_(out_RD);
  const at::Tensor y_TD = dispatcher.combine(placed_RD, handle).wait();
  EXPECT_TRUE(at::equal(y_TD, dispatcher.combine(out_RD, handle).wait()));
  dispatcher.result_rows(out_RD, handle);  // not used
  return {.y_TD = y_TD,
          .grad_x_TD = gradients.x_TD,
          .grad_weights_TK = gradients.weights_TK,
          .y_magnitude_TD = dispatcher.combine(out_RD.abs(), handle).wait(),
          .grad_x_magnitude_TD =
              dispatcher.dispatch_backward(grad_rows_RD.abs(), grad_weights_R, handle).wait().x_TD};
}

Results concatenate(const std::vector<Results>& parts) {
  const auto cat = [&](at::Tensor Results::* member) {
    std::vector<at::Tensor> tensors;
    tensors.reserve(parts.size());
    for (const Results& part : parts) tensors.push_back(part.*member);
    return at::cat(tensors);
  };
  return {.y_TD = cat(&Results::y_TD),
          .grad_x_TD = cat(&Results::grad_x_TD),
          .grad_weights_TK = cat(&Results::grad_weights_TK),
          .y_magnitude_TD = cat(&Results::y_magnitude_TD),
          .grad_x_magnitude_TD = cat(&Results::grad_x_magnitude_TD)};
}

Results run_chunks(moe::Dispatcher& dispatcher, const Tokens& tokens, std::int64_t first_expert,
                   std::int64_t num_chunks, std::int64_t capacity_rows) {
  std::vector<Tokens> chunks;
  std::vector<at::Tensor> ids;
  const std::int64_t total = tokens.ids_TK.size(0);
  for (std::int64_t i = 0; i < num_chunks; ++i) {
    const std::int64_t begin = total * i / num_chunks;
    const std::int64_t count = total * (i + 1) / num_chunks - begin;
    chunks.push_back({.ids_TK = tokens.ids_TK.narrow(0, begin, count),
                      .x_TD = tokens.x_TD.narrow(0, begin, count),
                      .weights_TK = tokens.weights_TK.narrow(0, begin, count),
                      .grad_y_TD = tokens.grad_y_TD.narrow(0, begin, count)});
    ids.push_back(chunks.back().ids_TK);
  }
  const auto handles = dispatcher.plan(
      {.chunk_ids_TK = ids, .capacity_rows = capacity_rows, .where = {.step = 1, .layer = 2, .phase = {}}});
  std::vector<Results> parts;
  parts.reserve(chunks.size());
  for (std::size_t i = 0; i < chunks.size(); ++i)
    parts.push_back(run_chunk(dispatcher, handles[i], chunks[i], first_expert));
  return concatenate(parts);
}

Results reference_of(const RoutingCase& routing, int num_ranks, at::ScalarType dtype) {
  const auto local = moe::make_local_dispatcher(routing.num_experts);
  return run_chunks(*local, tokens_of_all(routing, num_ranks, dtype), 0, 1, -1);
}

// |a - b| <= roundings * epsilon * magnitude, element by element.
void expect_close(const at::Tensor& a, const at::Tensor& b, const at::Tensor& magnitude,
                  std::int64_t roundings) {
  ASSERT_EQ(a.sizes(), b.sizes());
  const at::Tensor excess = (a.to(at::kDouble) - b.to(at::kDouble)).abs() -
                            test::bound(b.scalar_type(), roundings) * magnitude.to(at::kDouble);
  EXPECT_FALSE(a.isnan().any().item<bool>());
  EXPECT_TRUE(excess.le(0.0).all().item<bool>()) << "worst excess " << excess.max();
}

// All ranks of a layout, each with its part of the problem.
Results results_on(const test::DispatcherLayout& layout, const RoutingCase& routing, at::ScalarType dtype,
                   std::int64_t num_chunks, std::int64_t capacity_rows = -1) {
  std::vector<Results> parts(static_cast<std::size_t>(layout.ranks));
  test::run_layout(layout, [&](const std::shared_ptr<comm::Communicator>& ep) {
    const auto dispatcher = test::make_dispatcher_of(layout.options, routing.num_experts, ep);
    const moe::ExpertPlacement placement{.num_experts = routing.num_experts, .num_ranks = ep->size()};
    parts[static_cast<std::size_t>(ep->rank())] =
        run_chunks(*dispatcher, tokens_of(routing, ep->rank(), ep->size(), dtype),
                   placement.first(ep->rank()), num_chunks, capacity_rows);
  });
  return concatenate(parts);
}

class Dispatchers : public testing::TestWithParam<test::DispatcherLayout> {
 protected:
  void expect_equal_to_reference(const RoutingCase& routing, at::ScalarType dtype, std::int64_t num_chunks,
                                 std::int64_t capacity_rows = -1) const {
    SCOPED_TRACE(routing.name);
    const Results ours = results_on(GetParam(), routing, dtype, num_chunks, capacity_rows);
    const Results reference = reference_of(routing, GetParam().ranks, dtype);
    // K rows are added, on the way at up to three places; the reference rounds once more.
    const std::int64_t roundings = routing.top_k + 4;
    expect_close(ours.y_TD, reference.y_TD, reference.y_magnitude_TD, roundings);
    expect_close(ours.grad_x_TD, reference.grad_x_TD, reference.grad_x_magnitude_TD, roundings);
    // Rows arrive bit by bit, so their dot products differ by the order of summation at most.
    expect_close(ours.grad_weights_TK, reference.grad_weights_TK, reference.grad_weights_TK.abs() + 1.0,
                 100 * kWidth);
  }
};

TEST_P(Dispatchers, arrows_equal_the_local_dispatcher_on_all_tokens) {
  for (const RoutingCase& routing : test::all_routings()) {
    for (const std::int64_t num_chunks : {1, 3}) expect_equal_to_reference(routing, at::kDouble, num_chunks);
  }
}

TEST_P(Dispatchers, a_capacity_changes_padding_only) {
  for (const std::int64_t capacity_rows : {0, 1, 7, 1000})
    expect_equal_to_reference(test::skewed_routings()[1], at::kDouble, 2, capacity_rows);
}

TEST_P(Dispatchers, low_precision_stays_within_its_roundings) {
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    for (const RoutingCase& routing : test::all_routings()) expect_equal_to_reference(routing, dtype, 1);
  }
}

TEST_P(Dispatchers, backward_arrows_are_the_transposes_of_the_forward_ones) {
  for (const RoutingCase& routing : test::all_routings()) {
    SCOPED_TRACE(routing.name);
    const auto dot = [](const at::Tensor& a, const at::Tensor& b) { return (a * b).sum().item<double>(); };
    std::vector<std::array<double, 6>> products(static_cast<std::size_t>(GetParam().ranks));
    test::run_layout(GetParam(), [&](const std::shared_ptr<comm::Communicator>& ep) {
      const auto dispatcher = test::make_dispatcher_of(GetParam().options, routing.num_experts, ep);
      const Tokens tokens = tokens_of(routing, ep->rank(), ep->size(), at::kDouble);
      const auto handle = dispatcher->plan({.chunk_ids_TK = {&tokens.ids_TK, 1}, .where = {}})[0];
      const auto rows = dispatcher->dispatch(tokens.x_TD, tokens.weights_TK, handle).wait();
      const std::string name = std::to_string(ep->rank());
      const at::Tensor r_RD = random_tensor("r" + name, rows.rows.tensor().sizes());
      const at::Tensor s_R = random_tensor("s" + name, rows.weights_R.sizes());
      const auto gradients = dispatcher->dispatch_backward(r_RD, s_R, handle).wait();
      const at::Tensor y_TD = dispatcher->combine(r_RD, handle).wait();
      const at::Tensor grad_RD = dispatcher->combine_backward(tokens.grad_y_TD, handle).wait().tensor();
      products[static_cast<std::size_t>(ep->rank())] = {
          dot(rows.rows.tensor(), r_RD), dot(tokens.x_TD, gradients.x_TD),
          dot(rows.weights_R, s_R),      dot(tokens.weights_TK, gradients.weights_TK),
          dot(y_TD, tokens.grad_y_TD),   dot(r_RD, grad_RD)};
    });
    std::array<double, 6> sums{};
    for (const auto& of_rank : products) {
      for (std::size_t i = 0; i < sums.size(); ++i) sums[i] += of_rank[i];
    }
    // Sums of a few thousand products of normal numbers.
    for (const std::size_t i : {0, 2, 4}) EXPECT_NEAR(sums[i], sums[i + 1], 1e-10) << i;
  }
}

INSTANTIATE_TEST_SUITE_P(Layouts, Dispatchers, testing::ValuesIn(test::all_layouts()), test::layout_name);

// 2 nodes of 2 ranks, one expert per rank. Of rank 0's tokens a goes to e2 and e3, b to e1 and e3, c to e0.
//
//          a (x = 1)              b (x = 10)        c (x = 100)
//   node 0                        e1 on rank 1      e0 on rank 0      rank 0 keeps b and c: 2 copies on the
//   rail node 1 e2 rank 2, e3 rank 3   e3 on rank 3                        rank 2 gets a and b: 2 copies on
//   the rail
//
// Without nodes, rank 0 would send 3 rows to node 1 (a twice). The rows that experts see: e0: c, e1: b, e2:
// a, e3: a b. With experts that multiply by 1, 2, 3, 4: y = (3 + 4) a, (2 + 4) b, 1 c.
TEST(TwoLevel, hand_worked_copies) {
  comm::run_ranks(
      4,
      [](comm::Communicator& world) {
        const auto dispatcher =
            moe::make_dispatcher({.kind = moe::DispatcherKind::kTwoLevel}, 4, world.shared_from_this());
        const bool source = world.rank() == 0;
        const at::Tensor ids =
            source ? at::tensor({2, 3, 1, 3, 0, -1}, at::kInt).view({3, 2}) : at::empty({0, 2}, at::kInt);
        const at::Tensor x = source ? at::tensor({1.0, 10.0, 100.0}, at::kDouble).view({3, 1})
                                    : at::empty({0, 1}, at::kDouble);
        const at::Tensor weights =
            source ? at::tensor({0.5, 0.25, 0.75, 0.125, 1.0, 0.0}, at::kDouble).view({3, 2})
                   : at::empty({0, 2}, at::kDouble);
        const auto handle = dispatcher->plan({.chunk_ids_TK = {&ids, 1}, .where = {}})[0];
        const auto rows = dispatcher->dispatch(x, weights, handle).wait();
        const std::vector<std::vector<double>> expected_rows = {{100.0}, {10.0}, {1.0}, {1.0, 10.0}};
        const std::vector<std::vector<double>> expected_weights = {{1.0}, {0.75}, {0.5}, {0.25, 0.125}};
        const auto rank = static_cast<std::size_t>(world.rank());
        EXPECT_TRUE(at::equal(rows.rows.tensor().view({-1}), at::tensor(expected_rows[rank], at::kDouble)));
        EXPECT_TRUE(at::equal(rows.weights_R, at::tensor(expected_weights[rank], at::kDouble)));
        const at::Tensor y = dispatcher->combine((world.rank() + 1.0) * rows.rows.tensor(), handle).wait();
        if (source) {
          EXPECT_TRUE(at::equal(y.view({-1}), at::tensor({7.0, 60.0, 100.0}, at::kDouble)));
        }
      },
      {.ranks_per_node = 2});
}

TEST(TwoLevel, ranks_of_a_node_need_not_be_neighbours_in_the_group) {
  // World ranks 0 1 | 2 3 in the order 0 2 1 3: the group's nodes are 0, 1, 0, 1.
  const RoutingCase routing = test::skewed_routings()[0];
  const Results reference = reference_of(routing, 4, at::kDouble);
  std::vector<Results> parts(4);
  comm::run_ranks(
      4,
      [&](comm::Communicator& world) {
        const auto ep = world.split(0, 2 * (world.rank() % 2) + world.rank() / 2, "ep");
        const auto dispatcher = moe::make_dispatcher({.kind = moe::DispatcherKind::kTwoLevel}, 16, ep);
        parts[static_cast<std::size_t>(ep->rank())] = run_chunks(
            *dispatcher, tokens_of(routing, ep->rank(), 4, at::kDouble), std::int64_t{4} * ep->rank(), 2, -1);
      },
      {.ranks_per_node = 2});
  const Results ours = concatenate(parts);
  EXPECT_LE(test::relative_difference(ours.y_TD, reference.y_TD), 1e-14);
  EXPECT_LE(test::relative_difference(ours.grad_x_TD, reference.grad_x_TD), 1e-14);
}

// What a dispatcher says to three ranks on nodes of two.
std::string refusal_of(moe::DispatcherKind kind) {
  try {
    comm::run_ranks(
        3,
        [&](comm::Communicator& world) { moe::make_dispatcher({.kind = kind}, 6, world.shared_from_this()); },
        {.ranks_per_node = 2});
  } catch (const ConfigError& error) {
    return error.what();
  }
  ADD_FAILURE() << "was accepted";
  return "";
}

TEST(TwoLevel, refuses_nodes_of_different_sizes) {
  EXPECT_THAT(refusal_of(moe::DispatcherKind::kTwoLevel),
              testing::HasSubstr("node 0 holds 2 and node 1 holds 1"));
}

// A token's rows are summed in the order in which one rank would.
TEST(SharedMemory, arrows_give_the_bits_of_one_rank) {
  for (const int ranks : {2, 3}) {
    const test::DispatcherLayout layout{.options = {.kind = moe::DispatcherKind::kSharedMemory},
                                        .ranks = ranks};
    for (const RoutingCase& routing : test::all_routings()) {
      SCOPED_TRACE(routing.name);
      const Results reference = reference_of(routing, ranks, at::kFloat);
      const Results ours = results_on(layout, routing, at::kFloat, 1);
      EXPECT_TRUE(at::equal(ours.y_TD, reference.y_TD));
      EXPECT_TRUE(at::equal(ours.grad_x_TD, reference.grad_x_TD));
      EXPECT_TRUE(at::equal(ours.grad_weights_TK, reference.grad_weights_TK));
    }
  }
}

TEST(SharedMemory, refuses_ranks_on_several_nodes) {
  EXPECT_THAT(refusal_of(moe::DispatcherKind::kSharedMemory),
              testing::HasSubstr("rank 0 is on node 0 and rank 2 on node 1"));
}

}  // namespace
}  // namespace collegium
