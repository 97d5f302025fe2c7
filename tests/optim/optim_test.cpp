// SPDX-License-Identifier: Apache-2.0
#include <ATen/core/grad_mode.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "collegium/base/error.h"
#include "collegium/optim/adamw.h"
#include "collegium/optim/schedule.h"
#include "tests/support/tensors.h"

namespace collegium {
namespace {

model::Parameter parameter(const std::string& name, model::ParameterKind kind, at::ScalarType dtype) {
  model::Parameter p{.name = name,
                     .kind = kind,
                     .shape = {3, 5, 7},
                     .value = test::random_tensor(name, {3, 5, 7}, dtype),
                     .trainable = true};
  p.value.requires_grad_(true);
  return p;
}

// The formulas, one element at a time in double.
TEST(AdamW, equals_plain_loops_over_several_steps) {
  const optim::AdamWOptions options{.learning_rate = 0.1, .weight_decay = 0.2};
  for (const auto dtype : {at::kDouble, at::kFloat, at::kBFloat16}) {
    std::vector<model::Parameter> parameters = {parameter("matrix", model::ParameterKind::kExpert, dtype),
                                                parameter("norm", model::ParameterKind::kNorm, dtype)};
    optim::MasterWeights masters(parameters);
    for (std::size_t p = 0; p < 2; ++p) {
      const at::Tensor start = masters.slots()[p].master.to(at::kDouble).clone();
      std::vector<double> w(start.const_data_ptr<double>(), start.const_data_ptr<double>() + start.numel());
      std::vector<double> m(w.size(), 0.0);
      std::vector<double> v(w.size(), 0.0);
      const double decay = p == 0 ? 0.2 : 0.0;
      optim::MasterWeights fresh({parameters[p]});
      for (int step = 1; step <= 3; ++step) {
        const at::Tensor gradient = test::random_tensor(fmt::format("g{}", step), {3, 5, 7}, dtype);
        parameters[p].value.mutable_grad() = gradient;
        fresh.accumulate();
        parameters[p].value.mutable_grad() = gradient;
        fresh.accumulate();
        EXPECT_FALSE(parameters[p].value.grad().defined());
        const at::NoGradGuard no_grad;
        optim::adamw_step(options, 0.1, 0.5, step, fresh.slots());
        const at::Tensor wide = gradient.to(at::kDouble).contiguous();
        for (std::size_t i = 0; i < w.size(); ++i) {
          const double g = 0.5 * 2.0 * wide.const_data_ptr<double>()[i];
          m[i] = 0.9 * m[i] + 0.1 * g;
          v[i] = 0.95 * v[i] + 0.05 * g * g;
          w[i] -= 0.1 *
                  (m[i] / (1 - std::pow(0.9, step)) / (std::sqrt(v[i] / (1 - std::pow(0.95, step))) + 1e-8) +
                   decay * w[i]);
        }
      }
      const auto master = dtype == at::kDouble ? at::kDouble : at::kFloat;
      const at::Tensor expected = at::tensor(w, at::kDouble).view({3, 5, 7});
      EXPECT_LE(test::relative_difference(fresh.slots()[0].master, expected), test::bound(master, 3 * 12));
      EXPECT_TRUE(at::equal(parameters[p].value.detach(), fresh.slots()[0].master.to(dtype)));
      EXPECT_EQ(fresh.slots()[0].gradient.abs().sum().item<double>(), 0.0);
    }
  }
}

TEST(GradientNorm, counts_everything_once_and_names_what_is_not_finite) {
  std::vector<model::Parameter> parameters = {parameter("a", model::ParameterKind::kExpert, at::kFloat),
                                              parameter("b", model::ParameterKind::kDense, at::kFloat)};
  optim::MasterWeights masters(parameters);
  masters.slots()[0].gradient.fill_(2.0);
  masters.slots()[1].gradient.fill_(1.0);
  const optim::GradientNorm norm = optim::gradient_norm(optim::gradient_squares(masters.slots()));
  EXPECT_NEAR(norm.total, std::sqrt(105.0 * 4 + 105.0), 1e-12);
  EXPECT_NEAR(norm.by_kind.at("expert"), std::sqrt(420.0), 1e-12);
  masters.slots()[0].gradient[1][2][3] = std::numeric_limits<float>::infinity();
  try {
    optim::gradient_squares(masters.slots());
    FAIL();
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(), "the gradient of a (expert 1) is not finite");
  }
}

TEST(GradientNorm, what_the_backward_pass_reached_first_is_named) {
  std::vector<model::Parameter> parameters = {parameter("first", model::ParameterKind::kDense, at::kDouble),
                                              parameter("second", model::ParameterKind::kExpert, at::kDouble),
                                              parameter("last", model::ParameterKind::kDense, at::kDouble)};
  optim::MasterWeights masters(parameters);
  const auto message = [&] {
    try {
      optim::gradient_squares(masters.slots());
    } catch (const Error& error) {
      return std::string(error.what());
    }
    return std::string("accepted");
  };
  masters.slots()[0].gradient.fill_(std::numeric_limits<double>::quiet_NaN());
  masters.slots()[1].gradient[2].fill_(std::numeric_limits<double>::infinity());
  EXPECT_EQ(message(), "the gradient of second (expert 2) is not finite");
  masters.slots()[2].gradient.fill_(1e200);
  EXPECT_EQ(message(), "the norm of the gradient of last is not finite: its values are too large");
}

TEST(AdamW, what_is_frozen_stays) {
  for (const auto dtype : {at::kDouble, at::kBFloat16}) {
    std::vector<model::Parameter> parameters = {parameter("matrix", model::ParameterKind::kExpert, dtype)};
    parameters[0].frozen = at::zeros({3, 5, 7}, at::kBool);
    parameters[0].frozen[1].narrow(0, 2, 2).fill_(true);
    const at::Tensor before = parameters[0].value.detach().clone();
    optim::MasterWeights masters(parameters);
    parameters[0].value.mutable_grad() = test::random_tensor("g", {3, 5, 7}, dtype);
    masters.accumulate();
    masters.clear_frozen_gradients();
    EXPECT_TRUE(at::equal(masters.slots()[0].gradient == 0, parameters[0].frozen));
    const at::NoGradGuard no_grad;
    optim::adamw_step({.weight_decay = 0.5}, 0.1, 1.0, 1, masters.slots());
    const at::Tensor& frozen = parameters[0].frozen;
    EXPECT_TRUE(at::equal(parameters[0].value.masked_select(frozen), before.masked_select(frozen)));
    EXPECT_TRUE(at::equal(masters.slots()[0].master == before.to(masters.slots()[0].master), frozen));
    EXPECT_TRUE(at::equal(masters.slots()[0].first_moment == 0, parameters[0].frozen));
  }
}

TEST(Schedule, known_points) {
  const optim::ScheduleOptions cosine{
      .kind = optim::ScheduleKind::kCosine, .warmup_steps = 10, .final_ratio = 0.1};
  EXPECT_DOUBLE_EQ(optim::rate_factor(cosine, 5, 110), 0.5);
  EXPECT_DOUBLE_EQ(optim::rate_factor(cosine, 10, 110), 1.0);
  EXPECT_NEAR(optim::rate_factor(cosine, 60, 110), 0.55, 1e-15);
  EXPECT_NEAR(optim::rate_factor(cosine, 110, 110), 0.1, 1e-15);
  const optim::ScheduleOptions wsd{
      .kind = optim::ScheduleKind::kWsd, .final_ratio = 0.0, .decay_fraction = 0.2};
  EXPECT_DOUBLE_EQ(optim::rate_factor(wsd, 80, 100), 1.0);
  EXPECT_DOUBLE_EQ(optim::rate_factor(wsd, 90, 100), 0.5);
  EXPECT_DOUBLE_EQ(optim::rate_factor(wsd, 100, 100), 0.0);
}

}  // namespace
}  // namespace collegium
