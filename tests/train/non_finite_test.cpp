// SPDX-License-Identifier: Apache-2.0

// A loss or gradient that is not finite ends the run with step, layer and tensor named: parameters,
// activations, router logits, balance losses, gradients, on one rank and on several.

#include "collegium/train/non_finite.h"

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "collegium/base/error.h"
#include "collegium/comm/local/local.h"
#include "collegium/train/trainer.h"
#include "tests/support/tiny_run.h"

namespace collegium {
namespace {

class NonFinite : public test::TinyRun {
 protected:
  // What the second step of a run says after `spoil` has changed its weights.
  std::string message(const std::vector<std::string>& overrides,
                      const std::function<void(const train::Trainer&)>& spoil) const {
    train::Trainer trainer(train::read_run_config(folder_ / "run.toml", overrides));
    trainer.step();
    {
      const at::NoGradGuard no_grad;
      spoil(trainer);
    }
    try {
      trainer.step();
    } catch (const Error& error) {
      return error.what();
    }
    return "accepted";
  }
  // The same, with one tensor multiplied by a factor.
  std::string message(const std::string& tensor, double factor) const {
    return message({}, [&](const train::Trainer& trainer) { trainer.decoder().value(tensor).mul_(factor); });
  }
};

// Finite values of up to 1e308, whose products are not.
void make_huge(const model::Decoder& decoder, const std::vector<std::string>& tensors) {
  for (const std::string& name : tensors) {
    const at::Tensor& value = decoder.value(name);
    value.div_(value.abs().max()).mul_(1e308);
  }
}

TEST_F(NonFinite, activation_is_named) {
  const std::pair<std::vector<std::string>, const char*> cases[] = {
      {{"layers.1.attention.v", "layers.1.attention.o"}, "the attention output of layer 1"},
      {{"layers.0.post_norm"}, "the feed-forward input of layer 0"},
      {{"layers.1.moe.router"}, "the largest router logit of layer 1"},
      {{"layers.1.moe.gate_up", "layers.1.moe.down"}, "the feed-forward output of layer 1"},
      {{"norm"}, "the output of the final norm"},
      {{"lm_head"}, "the output of lm_head (the logits)"}};
  for (const auto& [tensors, expected] : cases) {
    const std::string text =
        message({}, [&](const train::Trainer& trainer) { make_huge(trainer.decoder(), tensors); });
    EXPECT_THAT(
        text, testing::MatchesRegex("step 2: the loss is (nan|infinite): .* is the first that is not finite"))
        << expected;
    EXPECT_THAT(text, testing::HasSubstr(expected));
  }
}

TEST_F(NonFinite, parameter_is_named) {
  EXPECT_THAT(message("layers.1.attention.k", std::numeric_limits<double>::quiet_NaN()),
              testing::HasSubstr("step 2: the loss is nan: parameter layers.1.attention.k is not finite"));
}

TEST_F(NonFinite, balance_loss_is_told_from_the_cross_entropy) {
  // fp32 logits of 1e25: their square is beyond fp32, while softmax and cross-entropy are finite.
  const std::string text = message({"train.dtype=float32"}, [](const train::Trainer& trainer) {
    trainer.decoder().value("layers.1.moe.router").mul_(1e25);
  });
  EXPECT_THAT(text,
              testing::StartsWith("step 2: the balance loss is infinite, its term z_loss is infinite: the "
                                  "router's sums of layer 1 are the first that are not finite; its largest "
                                  "logit here is "));
}

// A norm weight of 1e-300 before weights of 1e300: the forward pass is finite, the norm weight's gradient is
// not.
void make_gradient_overflow(const model::Decoder& decoder) {
  decoder.value("layers.1.post_norm").mul_(1e-300);
  decoder.value("layers.1.moe.gate_up").mul_(1e300);
  decoder.value("lm_head").mul_(1e30);
}

TEST_F(NonFinite, gradient_nearest_the_output_is_named) {
  EXPECT_EQ(message({}, [](const train::Trainer& trainer) { make_gradient_overflow(trainer.decoder()); }),
            "step 2: the gradient of layers.1.post_norm is not finite");
}

TEST_F(NonFinite, one_of_several_ranks_reports) {
  for (const bool gradient : {false, true}) {
    const std::string expected =
        gradient ? "the gradient of layers.1.post_norm is not finite" : "the feed-forward output of layer 0";
    std::string text;
    try {
      comm::run_ranks(3, [&](comm::Communicator& world) {
        train::Trainer trainer(train::read_run_config(folder_ / "run.toml", {}), world.shared_from_this());
        trainer.step();
        {
          const at::NoGradGuard no_grad;
          if (gradient) {
            make_gradient_overflow(trainer.decoder());
          } else {
            make_huge(trainer.decoder(), {"layers.0.moe.gate_up", "layers.0.moe.down"});
          }
        }
        trainer.step();
      });
    } catch (const std::exception& error) {
      text = error.what();
    }
    EXPECT_THAT(text, testing::HasSubstr("step 2: "));
    EXPECT_THAT(text, testing::HasSubstr(expected));
  }
}

}  // namespace
}  // namespace collegium
