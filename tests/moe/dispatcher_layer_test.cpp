// SPDX-License-Identifier: Apache-2.0

// The whole layer over ranks against the layer on one rank: output and every gradient, for every variant of
// cases.h, with and without overlap.

#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/stack.h>
#include <gtest/gtest.h>

#include <map>

#include "collegium/moe/layer.h"
#include "tests/moe/cases.h"
#include "tests/moe/dispatcher_layouts.h"
#include "tests/moe/layer_weights.h"

namespace collegium {
namespace {

using test::kWidth;
using test::random_tensor;

constexpr std::int64_t kSequences = 8;
constexpr std::int64_t kLength = 5;
constexpr moe::OverlapOptions kOverlapped = {.chunks = 3, .shared_expert = true, .weight_gradients = true};

struct Problem {
  moe::MoeOptions options;
  at::ScalarType dtype = at::kDouble;
  at::Tensor replayed_ids_TK;  // of all tokens, or undefined
};

// Output, gradients by name, and the choices.
struct Results {
  std::map<std::string, at::Tensor> tensors;
  at::Tensor chosen_ids_TK;
};

Results run_layer(const Problem& problem, const moe::ExpertTransport& transport,
                  const moe::ExpertPlacement& placement, int rank, std::int64_t first_sequence,
                  std::int64_t num_sequences) {
  auto run = std::make_shared<moe::LayerRun>();
  run->context = {.num_sequences = num_sequences,
                  .sequence_length = kLength,
                  .first_sequence = 2 + first_sequence,
                  .seed = 11,
                  .step = 3,
                  .layer = 1,
                  .training = true,
                  .padding_T = {}};
  const std::int64_t first_token = first_sequence * kLength;
  const auto share = [&](const at::Tensor& all_TX) {
    return all_TX.narrow(0, first_token, run->context.num_tokens());
  };
  if (problem.replayed_ids_TK.defined()) run->replayed_ids_TK = share(problem.replayed_ids_TK);
  // Stands for the gradient of any balance loss.
  run->statistics_gradient.prob_sums_BE = random_tensor("statistics", {1, problem.options.num_experts})
                                              .to(problem.dtype == at::kDouble ? at::kDouble : at::kFloat);
  moe::MoeWeights weights = test::make_weights(problem.options, problem.dtype);
  for (at::Tensor* experts : {&weights.gate_up_LGD, &weights.down_LDF})
    *experts = experts->narrow(0, placement.first(rank), placement.count(rank)).clone();
  at::Tensor x_TD = share(random_tensor("x", {kSequences * kLength, kWidth}, problem.dtype)).clone();
  const auto tensors = test::differentiable(weights, x_TD);
  for (const auto& [name, tensor] : tensors) tensor->requires_grad_(true);
  const at::Tensor y_TD = moe::moe_layer(problem.options, weights, transport, x_TD, run);
  y_TD.backward(share(random_tensor("g", {kSequences * kLength, kWidth}, problem.dtype)));
  Results results{.tensors = {{"y", y_TD.detach()}}, .chosen_ids_TK = run->routing.chosen_ids_TK};
  for (const auto& [name, tensor] : tensors) results.tensors[name] = tensor->grad();
  return results;
}

Results run_on_one_rank(const Problem& problem) {
  const moe::ExpertPlacement placement{.num_experts = problem.options.num_experts, .num_ranks = 1};
  return run_layer(problem, {.dispatcher = moe::make_local_dispatcher(placement.num_experts), .overlap = {}},
                   placement, 0, 0, kSequences);
}

// Pairs of sequences, so that capacity groups stay whole; rank 1 has none.
std::vector<std::int64_t> sequences_of_ranks(int num_ranks) {
  std::vector<std::int64_t> sequences(static_cast<std::size_t>(num_ranks), 0);
  for (std::int64_t pair = 0; pair < kSequences / 2; ++pair) {
    std::int64_t rank = pair % num_ranks;
    if (rank == 1) rank = num_ranks - 1;
    sequences[static_cast<std::size_t>(rank)] += 2;
  }
  return sequences;
}

Results run_on_ranks(const test::DispatcherLayout& layout, const moe::OverlapOptions& overlap,
                     const Problem& problem) {
  std::vector<Results> parts(static_cast<std::size_t>(layout.ranks));
  const std::vector<std::int64_t> sequences = sequences_of_ranks(layout.ranks);
  test::run_layout(layout, [&](const std::shared_ptr<comm::Communicator>& ep) {
    const moe::ExpertPlacement placement{.num_experts = problem.options.num_experts, .num_ranks = ep->size()};
    const auto rank = static_cast<std::size_t>(ep->rank());
    const auto mine = sequences.begin() + ep->rank();
    parts[rank] = run_layer(
        problem,
        {.dispatcher = moe::make_dispatcher(layout.options, placement.num_experts, ep), .overlap = overlap},
        placement, ep->rank(), std::accumulate(sequences.begin(), mine, std::int64_t{0}), *mine);
  });
  Results all;
  for (const auto& [name, unused] : parts[0].tensors) {
    std::vector<at::Tensor> tensors;
    tensors.reserve(parts.size());
    for (const Results& part : parts) tensors.push_back(part.tensors.at(name));
    const bool shared_out = name == "y" || name == "x" || name == "gate_up" || name == "down";
    all.tensors[name] = shared_out ? at::cat(tensors) : at::stack(tensors).sum(0);
  }
  return all;
}

void expect_equal(const Results& ours, const Results& reference, double tolerance) {
  for (const auto& [name, tensor] : reference.tensors)
    EXPECT_LE(test::relative_difference(ours.tensors.at(name), tensor), tolerance) << name;
}

// Capacity with drops, noise, a shared expert, and expert counts that do not divide.
moe::MoeOptions everything() {
  moe::MoeOptions options = test::base_options();
  options.num_experts = 13;
  options.top_k = 3;
  options.router.noise = moe::Noise::kJitterInput;
  options.router.jitter_epsilon = 0.3;
  options.capacity = {.drop_policy = moe::DropPolicy::kPosition, .factor = "0.7", .min_capacity = 1};
  options.shared_expert = {.kind = moe::SharedExpert::kGated, .ffn_size = 4};
  return options;
}

class LayerOverRanks : public testing::TestWithParam<test::DispatcherLayout> {};

TEST_P(LayerOverRanks, output_and_gradients_equal_one_rank) {
  const Problem problem{.options = everything(), .replayed_ids_TK = {}};
  const Results reference = run_on_one_rank(problem);
  for (const moe::OverlapOptions& overlap : {moe::OverlapOptions{}, kOverlapped})
    expect_equal(run_on_ranks(GetParam(), overlap, problem), reference, 1e-11);
}

TEST_P(LayerOverRanks, low_precision_stays_within_its_roundings) {
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    Problem problem{.options = everything(), .dtype = dtype, .replayed_ids_TK = {}};
    const Results reference = run_on_one_rank(problem);
    problem.replayed_ids_TK = reference.chosen_ids_TK;
    // On the longest way, that of a gradient of x: two GEMMs and SwiGLU, partial sums at three places, the
    // shared expert's and the router's parts, and the reference's own; each GEMM adds in fp32.
    const double tolerance = test::bound(dtype, 9) + test::bound(at::kFloat, 2 * kWidth);
    expect_equal(run_on_ranks(GetParam(), kOverlapped, problem), reference, tolerance);
  }
}

TEST_P(LayerOverRanks, reruns_are_bit_identical) {
  const Problem problem{.options = everything(), .dtype = at::kFloat, .replayed_ids_TK = {}};
  const Results first = run_on_ranks(GetParam(), kOverlapped, problem);
  const Results second = run_on_ranks(GetParam(), kOverlapped, problem);
  for (const auto& [name, tensor] : first.tensors)
    EXPECT_TRUE(at::equal(tensor, second.tensors.at(name))) << name;
}

INSTANTIATE_TEST_SUITE_P(Layouts, LayerOverRanks, testing::ValuesIn(test::all_layouts()), test::layout_name);

class VariantOverRanks : public testing::TestWithParam<test::MoeCase> {};

TEST_P(VariantOverRanks, output_and_gradients_equal_one_rank) {
  Problem problem{.options = test::base_options(), .replayed_ids_TK = {}};
  GetParam().change(problem.options);
  const Results reference = run_on_one_rank(problem);
  for (const test::DispatcherLayout& layout : test::all_layouts()) {
    if (layout.ranks != 4) continue;
    SCOPED_TRACE(layout.name());
    expect_equal(run_on_ranks(layout, kOverlapped, problem), reference, 1e-11);
  }
}

INSTANTIATE_TEST_SUITE_P(All, VariantOverRanks, testing::ValuesIn(test::moe_cases()),
                         [](const auto& variant) { return variant.param.name; });

// A frozen layer below: no gradient of x is wanted, so no rows travel in dispatch backward.
TEST(LayerOverRanksWithoutInputGradient, weight_gradients_equal_one_rank) {
  const Problem problem{.options = everything(), .replayed_ids_TK = {}};
  const auto gate_gradient = [&](const moe::ExpertTransport& transport, int rank, int ranks,
                                 std::int64_t sequences) {
    const moe::ExpertPlacement placement{.num_experts = 13, .num_ranks = ranks};
    auto run = std::make_shared<moe::LayerRun>();
    run->context.num_sequences = sequences;
    run->context.first_sequence = rank * sequences;
    run->context.sequence_length = kLength;
    moe::MoeWeights weights = test::make_weights(problem.options);
    weights.gate_up_LGD = weights.gate_up_LGD.narrow(0, placement.first(rank), placement.count(rank)).clone();
    weights.down_LDF = weights.down_LDF.narrow(0, placement.first(rank), placement.count(rank)).clone();
    weights.router.gate_ED.requires_grad_(true);
    const at::Tensor x_TD = random_tensor("x", {kSequences * kLength, kWidth})
                                .narrow(0, rank * sequences * kLength, sequences * kLength);
    moe::moe_layer(problem.options, weights, transport, x_TD, run).sum().backward();
    return weights.router.gate_ED.grad();
  };
  const at::Tensor reference =
      gate_gradient({.dispatcher = moe::make_local_dispatcher(13), .overlap = {}}, 0, 1, kSequences);
  for (const test::DispatcherLayout& layout : test::all_layouts()) {
    if (kSequences % layout.ranks != 0) continue;
    std::vector<at::Tensor> parts(static_cast<std::size_t>(layout.ranks));
    test::run_layout(layout, [&](const std::shared_ptr<comm::Communicator>& ep) {
      parts[static_cast<std::size_t>(ep->rank())] =
          gate_gradient({.dispatcher = moe::make_dispatcher(layout.options, 13, ep), .overlap = kOverlapped},
                        ep->rank(), ep->size(), kSequences / ep->size());
    });
    EXPECT_LE(test::relative_difference(at::stack(parts).sum(0), reference), 1e-11) << layout.name();
  }
}

}  // namespace
}  // namespace collegium
