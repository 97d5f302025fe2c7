// SPDX-License-Identifier: Apache-2.0
// One tiny decoder with dense and expert layers: recomputation, cache, masks, loss and sampling.
#include "collegium/model/decoder.h"

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/cross_entropy_loss.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <gmock/gmock.h>

#include <limits>

#include "collegium/base/error.h"
#include "collegium/model/attention.h"
#include "collegium/model/generate.h"
#include "tests/support/product_ways.h"
#include "tests/support/tensors.h"
#include "tests/support/tiny_decoder.h"

namespace collegium::model {
namespace {

using test::bound;
using test::kTinyVocabulary;
using test::relative_difference;
using test::tiny_decoder;
using test::tiny_ids;

std::vector<at::Tensor> gradients(const Decoder& decoder, bool recompute) {
  ForwardOptions options;
  options.recompute = recompute;
  const ForwardResult result = decoder.forward(tiny_ids(), options);
  cross_entropy_sum(decoder, result.hidden_BSD, tiny_ids().roll(1, 1)).backward();
  std::vector<at::Tensor> all;
  for (const Parameter& parameter : decoder.parameters()) {
    all.push_back(parameter.value.grad().clone());
    parameter.value.mutable_grad() = at::Tensor();
  }
  return all;
}

TEST(Decoder, recomputation_changes_no_bit_of_any_gradient) {
  for (const auto dtype : {at::kDouble, at::kFloat, at::kBFloat16}) {
    const Decoder decoder = tiny_decoder(dtype);
    for (const auto ways : ops::kAllProductWays) {
      const test::AssumeProductWays assume(ways);
      const auto kept = gradients(decoder, false);
      const auto recomputed = gradients(decoder, true);
      for (std::size_t i = 0; i < kept.size(); ++i)
        EXPECT_TRUE(at::equal(kept[i], recomputed[i])) << decoder.parameters()[i].name;
    }
  }
}

TEST(Decoder, cached_logits_equal_uncached_ones) {
  const at::NoGradGuard no_grad;
  for (const std::int64_t window : {0, 4}) {
    const Decoder decoder = tiny_decoder(at::kDouble, window);
    const at::Tensor whole = decoder.forward(tiny_ids(), {}).hidden_BSD;
    KvCache cache;
    ForwardOptions options;
    options.cache = &cache;
    std::vector<at::Tensor> pieces;
    std::int64_t begin = 0;
    for (const std::int64_t size : {3, 5, 1, 1, 1}) {  // several positions at once on a filled cache, too
      pieces.push_back(decoder.forward(tiny_ids().narrow(1, begin, size), options).hidden_BSD);
      begin += size;
    }
    EXPECT_LE(relative_difference(at::cat(pieces, 1), whole), bound(at::kDouble, 1000));
  }
}

TEST(Decoder, forced_choices_follow_positions_with_a_cache_too) {
  const at::NoGradGuard no_grad;
  const Decoder plain = tiny_decoder(at::kDouble);
  const at::Tensor ids = tiny_ids().narrow(0, 0, 1);
  for (const auto selection : {moe::Selection::kForcedBalance, moe::Selection::kForcedSkew}) {
    ModelConfig config = plain.config();
    config.moe.router.selection = selection;
    config.moe.router.forced_skew = 1.5;
    const Decoder decoder(config, plain.parameters());
    const at::Tensor whole = decoder.forward(ids, {}).layers[0]->routing.expert_ids_TK;
    KvCache cache;
    ForwardOptions options;
    options.cache = &cache;
    std::vector<at::Tensor> pieces;
    std::int64_t begin = 0;
    for (const std::int64_t size : {8, 1, 1, 1}) {
      const ForwardResult result = decoder.forward(ids.narrow(1, begin, size), options);
      pieces.push_back(result.layers[0]->routing.expert_ids_TK);
      begin += size;
    }
    EXPECT_TRUE(at::equal(at::cat(pieces), whole)) << enum_name(selection);
  }
}

TEST(Decoder, masked_documents_do_not_see_each_other) {
  const at::NoGradGuard no_grad;
  const Decoder decoder = tiny_decoder(at::kDouble);
  ForwardOptions options;
  options.document_ids_BS = at::cat({at::zeros({2, 4}, at::kLong), at::ones({2, 7}, at::kLong)}, 1);
  at::Tensor other = tiny_ids().clone();
  other.narrow(1, 0, 4).fill_(0);
  const at::Tensor a = decoder.forward(tiny_ids(), options).hidden_BSD.narrow(1, 4, 7);
  const at::Tensor b = decoder.forward(other, options).hidden_BSD.narrow(1, 4, 7);
  EXPECT_LE(relative_difference(a, b), bound(at::kDouble, 1000));
  EXPECT_GT(relative_difference(decoder.forward(tiny_ids(), {}).hidden_BSD.narrow(1, 4, 7), a), 1e-3);
}

// A rounded logit moves a probability by its rounding error, at most half an epsilon of the largest logit.
TEST(CrossEntropySum, in_bf16_equals_float64_with_and_without_bf16_instructions) {
  const Decoder decoder = tiny_decoder(at::kBFloat16);
  const at::Tensor& head = decoder.output_matrix();
  const at::Tensor targets = at::arange(1100, at::kLong).remainder(29).view({1, 1100});
  const at::Tensor start = test::random_tensor("hidden", {1, 1100, 12}, at::kBFloat16);
  const at::Tensor exact_hidden = start.to(at::kDouble).requires_grad_(true);
  const at::Tensor exact_head = head.detach().to(at::kDouble).requires_grad_(true);
  const at::Tensor logits = at::linear(exact_hidden, exact_head).flatten(0, 1);
  const at::Tensor exact = at::cross_entropy_loss(logits, targets.flatten(), {}, at::Reduction::Sum);
  exact.backward();
  const double limit = bound(at::kBFloat16, 2) * std::max(1.0, logits.abs().max().item<double>());
  for (const auto ways : ops::kAllProductWays) {
    const test::AssumeProductWays assume(ways);
    const at::Tensor hidden = start.clone().requires_grad_(true);
    const at::Tensor loss = cross_entropy_sum(decoder, hidden, targets);
    loss.backward();
    EXPECT_NEAR(loss.item<double>(), exact.item<double>(), limit * 1100);
    EXPECT_LE(relative_difference(hidden.grad(), exact_hidden.grad()), limit);
    EXPECT_LE(relative_difference(head.grad(), exact_head.grad()), limit);
    head.mutable_grad() = at::Tensor();
  }
}

// With a mask another kernel than in training computes attention.
TEST(Attention, masked_in_bf16_equals_float64_with_and_without_bf16_instructions) {
  const at::NoGradGuard no_grad;
  ModelConfig c;
  c.num_heads = 4;
  c.num_kv_heads = 2;
  c.head_dim = 6;
  c.sliding_window = 4;
  const auto weight = [](const char* name, std::int64_t rows, std::int64_t columns) {
    return test::random_tensor(name, {rows, columns}, at::kBFloat16) * 0.3;
  };
  AttentionWeights weights{.q = weight("q", 24, 12),
                           .k = weight("k", 12, 12),
                           .v = weight("v", 12, 12),
                           .o = weight("o", 12, 24),
                           .q_norm = {},
                           .k_norm = {}};
  const at::Tensor x = test::random_tensor("x", {2, 11, 12}, at::kBFloat16);
  const auto mixed = [&](at::ScalarType dtype) {
    AttentionWeights w = weights;
    for (at::Tensor* t : {&w.q, &w.k, &w.v, &w.o}) *t = t->to(dtype);
    return attention(c, w, x.to(dtype), attention_context(c, 0, 11, {}, dtype), nullptr);
  };
  const at::Tensor exact = mixed(at::kDouble);
  for (const auto ways : ops::kAllProductWays) {
    const test::AssumeProductWays assume(ways);
    const at::Tensor ours = mixed(at::kBFloat16);
    EXPECT_EQ(ours.scalar_type(), at::kBFloat16);
    // Projections, rotation, scores, mixture and output are rounded one after the other.
    EXPECT_LE(relative_difference(ours, exact), bound(at::kBFloat16, 8));
  }
}

TEST(CrossEntropySum, equals_autograd_over_several_chunks) {
  const Decoder decoder = tiny_decoder(at::kDouble);
  const at::Tensor hidden = test::random_tensor("hidden", {3, 700, 12}).requires_grad_(true);
  at::Tensor targets = at::arange(2100, at::kLong).remainder(29).view({3, 700});
  targets.narrow(1, 5, 9).fill_(-100);
  const at::Tensor& head = decoder.output_matrix();
  cross_entropy_sum(decoder, hidden, targets).mul(0.3).backward();
  const at::Tensor ours_hidden = hidden.grad().clone();
  const at::Tensor ours_head = head.grad().clone();
  hidden.mutable_grad() = at::Tensor();
  head.mutable_grad() = at::Tensor();
  at::cross_entropy_loss(at::linear(hidden, head).flatten(0, 1), targets.flatten(), {}, at::Reduction::Sum)
      .mul(0.3)
      .backward();
  EXPECT_LE(relative_difference(ours_hidden, hidden.grad()), bound(at::kDouble, 29));
  EXPECT_LE(relative_difference(ours_head, head.grad()), bound(at::kDouble, 2100));
}

TEST(Generate, is_a_function_of_its_seed_and_stops_at_the_end_token) {
  const Decoder decoder = tiny_decoder(at::kFloat);
  SamplingOptions options{
      .max_tokens = 20, .temperature = 1.5, .top_k = 20, .top_p = 0.95, .seed = 1, .eos_ids = {}};
  const auto first = generate(decoder, {1, 2, 3}, options);
  EXPECT_EQ(first, generate(decoder, {1, 2, 3}, options));
  options.seed = 2;
  EXPECT_NE(first, generate(decoder, {1, 2, 3}, options));
  options.seed = 1;
  options.eos_ids = {first[4], kTinyVocabulary};
  const auto stopped = generate(decoder, {1, 2, 3}, options);
  EXPECT_EQ(stopped.back(), first[4]);
  EXPECT_LE(stopped.size(), 5U);
}

TEST(Generate, refuses_prompts_outside_the_vocabulary_and_beyond_the_positions) {
  const Decoder decoder = tiny_decoder(at::kFloat);
  const auto message = [&](const std::vector<std::int64_t>& prompt, std::int64_t max_tokens) {
    try {
      generate(decoder, prompt, {.max_tokens = max_tokens, .eos_ids = {}});
    } catch (const ConfigError& error) {
      return std::string(error.what());
    }
    return std::string("no error");
  };
  EXPECT_THAT(message({}, 1), testing::HasSubstr("the prompt is empty"));
  EXPECT_THAT(message({1, 29}, 1), testing::HasSubstr("prompt token 29: must lie in [0, vocab_size = 29)"));
  EXPECT_THAT(message({1}, 32), testing::HasSubstr("more than the model's max_positions = 32"));
}

TEST(Generate, refuses_experts_that_choose_among_later_tokens) {
  ModelConfig config = tiny_decoder(at::kFloat).config();
  config.moe.router.selection = moe::Selection::kExpertChoice;
  try {
    require_generation(config, "generate");
    FAIL();
  } catch (const ConfigError& error) {
    EXPECT_THAT(error.what(),
                testing::StartsWith("generate: model.moe.router.selection = \"expert_choice\": text"));
  }
}

TEST(Generate, logits_that_are_not_finite_are_an_error_before_any_token) {
  const Decoder decoder = tiny_decoder(at::kFloat);
  {
    const at::NoGradGuard no_grad;
    decoder.value("lm_head")[5].fill_(std::numeric_limits<float>::quiet_NaN());
  }
  int seen = 0;
  try {
    generate(decoder, {1, 2, 3}, {.max_tokens = 2, .temperature = 0.0, .eos_ids = {}},
             [&](std::int64_t) { ++seen; });
    FAIL();
  } catch (const ConfigError&) {
    FAIL() << "the user can do nothing about it";
  } catch (const Error& error) {
    EXPECT_THAT(
        error.what(),
        testing::HasSubstr("the logits of token 3 are not finite: an activation exceeds what float32"));
  }
  EXPECT_EQ(seen, 0);
}

}  // namespace
}  // namespace collegium::model
