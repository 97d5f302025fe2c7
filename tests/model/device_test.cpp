// SPDX-License-Identifier: Apache-2.0

// The ATen forms that devices other than the CPU run, against the CPU's kernels: every variant of the layer,
// and a whole decoder with its loss. On a GPU where libtorch finds one, else on a device made of memory that
// the CPU may not read.
#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <gtest/gtest.h>

#include "collegium/model/decoder.h"
#include "collegium/moe/layer.h"
#include "tests/moe/cases.h"
#include "tests/moe/layer_weights.h"
#include "tests/moe/router_oracle.h"
#include "tests/support/opaque_device.h"
#include "tests/support/tensors.h"
#include "tests/support/tiny_decoder.h"

namespace collegium {
namespace {

using test::bound;
using test::random_tensor;
using test::relative_difference;

using Named = std::vector<std::pair<std::string, at::Tensor>>;

constexpr std::int64_t kSequences = 4;
constexpr std::int64_t kLength = 5;

// Sums over tokens, widths and experts follow one another; none is longer than some hundred terms here.
constexpr std::int64_t kRoundings = 1000;

void expect_equal(const Named& ours, const Named& theirs, double tolerance) {
  ASSERT_EQ(ours.size(), theirs.size());
  for (std::size_t i = 0; i < ours.size(); ++i)
    EXPECT_LE(relative_difference(ours[i].second.cpu(), theirs[i].second.cpu()), tolerance) << ours[i].first;
}

// The layer's output and every gradient, on `device`.
Named run_layer(const moe::MoeOptions& o, const at::Device& device) {
  auto run = std::make_shared<moe::LayerRun>();
  run->context.num_sequences = kSequences;
  run->context.sequence_length = kLength;
  run->context.seed = 11;
  run->context.training = true;
  moe::MoeWeights weights = test::make_weights(o);
  at::Tensor x_TD = random_tensor("x", {run->context.num_tokens(), test::kWidth});
  if (weights.router.expert_bias_E.defined())
    weights.router.expert_bias_E = weights.router.expert_bias_E.to(device);
  const auto tensors = test::differentiable(weights, x_TD);
  for (const auto& [name, tensor] : tensors) *tensor = tensor->to(device).requires_grad_();
  const auto dispatcher = moe::make_local_dispatcher(o.num_experts);
  const at::Tensor y_TD = moe::moe_layer(o, weights, {.dispatcher = dispatcher, .overlap = {}}, x_TD, run);
  run->statistics_gradient = test::balance_of(o, run->statistics).layers[0];
  (y_TD * random_tensor("g", y_TD.sizes()).to(device)).sum().backward();
  Named all = {{"output", y_TD.detach()}};
  for (const auto& [name, tensor] : tensors) all.emplace_back("gradient of " + name, tensor->grad());
  if (weights.router.expert_bias_E.defined()) {
    const moe::RouterTotals totals(run->statistics);
    moe::update_expert_bias(weights.router.expert_bias_E, totals.choice_counts_E().to(at::kLong), 0.01);
    all.emplace_back("bias", weights.router.expert_bias_E);
  }
  return all;
}

// The report of the tests says which it was.
at::Device other_device() {
  const at::Device device = at::hasCUDA() ? at::Device(at::kCUDA, 0) : test::opaque_device();
  testing::Test::RecordProperty("device", device.str());
  return device;
}

class LayerOnOtherDevice : public testing::TestWithParam<test::MoeCase> {};

TEST_P(LayerOnOtherDevice, equals_the_cpu) {
  moe::MoeOptions options = test::base_options();
  GetParam().change(options);
  expect_equal(run_layer(options, other_device()), run_layer(options, at::kCPU),
               bound(at::kDouble, kRoundings));
}

INSTANTIATE_TEST_SUITE_P(Variants, LayerOnOtherDevice, testing::ValuesIn(test::moe_cases()),
                         [](const auto& variant) { return variant.param.name; });

// Loss, last hidden states and every gradient of a decoder with dense and expert layers.
Named run_decoder(at::ScalarType dtype, bool recompute, bool documents, const at::Device& device) {
  const model::Decoder decoder = test::tiny_decoder(dtype, 0, device);
  const at::Tensor ids = test::tiny_ids().to(device);
  model::ForwardOptions options;
  options.recompute = recompute;
  if (documents) options.document_ids_BS = at::arange(22, at::kLong).div(4, "floor").view({2, 11}).to(device);
  const model::ForwardResult result = decoder.forward(ids, options);
  const at::Tensor loss = model::cross_entropy_sum(decoder, result.hidden_BSD, ids.roll(1, 1));
  loss.backward();
  Named all = {{"loss", loss.detach()}, {"hidden", result.hidden_BSD.detach()}};
  for (const model::Parameter& parameter : decoder.parameters())
    all.emplace_back("gradient of " + parameter.name, parameter.value.grad());
  return all;
}

TEST(OnOtherDevice, decoder_loss_and_gradients_equal_the_cpu) {
  for (const bool recompute : {false, true}) {
    for (const bool documents : {false, true}) {
      SCOPED_TRACE(testing::Message() << "recompute " << recompute << " documents " << documents);
      for (const auto dtype : {at::kDouble, at::kFloat})
        expect_equal(run_decoder(dtype, recompute, documents, other_device()),
                     run_decoder(dtype, recompute, documents, at::kCPU), bound(dtype, kRoundings));
    }
  }
}

// bfloat16 rounds at other places on either side, so both are compared with float64.
TEST(OnOtherDevice, bfloat16_is_as_far_from_float64_as_on_the_cpu) {
  const Named exact = run_decoder(at::kDouble, false, false, at::kCPU);
  const auto distance = [&exact](const at::Device& device) {
    const Named low = run_decoder(at::kBFloat16, false, false, device);
    return relative_difference(low[1].second.cpu(), exact[1].second);
  };
  EXPECT_LE(distance(other_device()), 2.0 * distance(at::kCPU) + bound(at::kBFloat16, 1));
}

}  // namespace
}  // namespace collegium
