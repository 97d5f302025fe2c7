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
class PlainAdamW {
 public:
  PlainAdamW(const optim::AdamWOptions& options, const at::Tensor& start, double decay)
      : o_(options), decay_(decay), w_(values(start)), m_(w_.size(), 0.0), v_(w_.size(), 0.0) {}

  void step(const at::Tensor& gradient, double rate, int step) {
    const std::vector<double> g = values(gradient);
    for (std::size_t i = 0; i < w_.size(); ++i) {
      m_[i] = o_.beta1 * m_[i] + (1.0 - o_.beta1) * g[i];
      v_[i] = o_.beta2 * v_[i] + (1.0 - o_.beta2) * g[i] * g[i];
      const double m = m_[i] / (1.0 - std::pow(o_.beta1, step));
      const double v = v_[i] / (1.0 - std::pow(o_.beta2, step));
      w_[i] -= rate * (m / (std::sqrt(v) + o_.epsilon) + decay_ * w_[i]);
    }
  }
  void expect_equals(const optim::Slot& slot, double bound) const {
    const std::pair<at::Tensor, const std::vector<double>*> pairs[] = {
        {slot.master, &w_}, {slot.first_moment, &m_}, {slot.second_moment, &v_}};
    for (const auto& [ours, expected] : pairs) {
      EXPECT_LE(test::relative_difference(ours, at::tensor(*expected, at::kDouble).view(ours.sizes())), bound)
          << "beta2 " << o_.beta2;
    }
  }

 private:
  static std::vector<double> values(const at::Tensor& tensor) {
    const at::Tensor wide = tensor.detach().to(at::kDouble).contiguous();
    return {wide.const_data_ptr<double>(), wide.const_data_ptr<double>() + wide.numel()};
  }

  optim::AdamWOptions o_;
  double decay_;
  std::vector<double> w_;
  std::vector<double> m_;
  std::vector<double> v_;
};

TEST(AdamW, equals_plain_loops_over_several_steps) {
  for (const double beta2 : {0.95, 0.999, 0.99999, 0.99999999}) {
    const optim::AdamWOptions options{.learning_rate = 0.1, .beta2 = beta2, .weight_decay = 0.2};
    for (const auto dtype : {at::kDouble, at::kFloat, at::kBFloat16}) {
      for (const auto kind : {model::ParameterKind::kExpert, model::ParameterKind::kNorm}) {
        model::Parameter p = parameter("p", kind, dtype);
        optim::MasterWeights masters({p});
        optim::Slot& slot = masters.slots()[0];
        PlainAdamW plain(options, slot.master, kind == model::ParameterKind::kNorm ? 0.0 : 0.2);
        for (int step = 1; step <= 3; ++step) {
          const at::Tensor gradient = test::random_tensor(fmt::format("g{}", step), {3, 5, 7}, dtype);
          for (int twice = 0; twice < 2; ++twice) {
            p.value.mutable_grad() = gradient;
            masters.accumulate();
            EXPECT_FALSE(p.value.grad().defined());
          }
          const at::NoGradGuard no_grad;
          optim::adamw_step(options, 0.1, 0.5, step, masters.slots());
          plain.step(gradient, 0.1, step);
        }
        plain.expect_equals(slot, test::bound(dtype == at::kDouble ? at::kDouble : at::kFloat, 36));
        EXPECT_TRUE(at::equal(p.value.detach(), slot.master.to(dtype)));
        EXPECT_EQ(slot.gradient.abs().sum().item<double>(), 0.0);
      }
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
  // A warm-up that leaves fewer steps than decay_fraction asks for: no jump.
  const optim::ScheduleOptions late{
      .kind = optim::ScheduleKind::kWsd, .warmup_steps = 90, .final_ratio = 0.0, .decay_fraction = 0.2};
  EXPECT_DOUBLE_EQ(optim::rate_factor(late, 90, 100), 1.0);
  EXPECT_DOUBLE_EQ(optim::rate_factor(late, 91, 100), 0.9);
  EXPECT_DOUBLE_EQ(optim::rate_factor(late, 100, 100), 0.0);
}

}  // namespace
}  // namespace collegium
