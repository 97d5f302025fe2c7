// SPDX-License-Identifier: Apache-2.0
#include "collegium/model/softmax_loss.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/log_softmax.h>

#include <algorithm>
#include <cmath>

#include "collegium/base/error.h"
#include "collegium/ops/row_math.h"

namespace collegium::model {

namespace {

using ops::row_math::narrow;
using ops::row_math::Wide;
using ops::row_math::widen;

constexpr std::int64_t kLossRowsPerTask = 8;

template <typename T>
COLLEGIUM_INLINE double row_loss_of(T* row, std::int64_t width, std::int64_t target, bool gradient) {
  using W = Wide<T>;
  const W largest = ops::row_math::lane_max(row, width);
  const W sum = ops::row_math::lane_sum<W>(
      width, [=](std::int64_t i) { return ops::row_math::exp_of_negative(widen(row[i]) - largest); });
  const double loss = static_cast<double>(largest - widen(row[target])) + std::log(static_cast<double>(sum));
  if (!gradient) return loss;
  const W scale = W{1} / sum;
  const W at_target = ops::row_math::exp_of_negative(widen(row[target]) - largest) * scale - W{1};
  for (std::int64_t i = 0; i < width; ++i) {
    row[i] = narrow<T>(ops::row_math::exp_of_negative(widen(row[i]) - largest) * scale);
  }
  row[target] = narrow<T>(at_target);
  return loss;
}

COLLEGIUM_CLONES double row_loss(double* row, std::int64_t width, std::int64_t target, bool gradient) {
  return row_loss_of(row, width, target, gradient);
}
COLLEGIUM_CLONES double row_loss(float* row, std::int64_t width, std::int64_t target, bool gradient) {
  return row_loss_of(row, width, target, gradient);
}
COLLEGIUM_CLONES double row_loss(c10::BFloat16* row, std::int64_t width, std::int64_t target, bool gradient) {
  return row_loss_of(row, width, target, gradient);
}

}  // namespace

at::Tensor softmax_loss(at::Tensor& logits_TV, const at::Tensor& targets_T, bool gradient) {
  COLLEGIUM_CHECK(logits_TV.dim() == 2 && logits_TV.is_contiguous() && targets_T.numel() == logits_TV.size(0),
                  "{} targets for {} rows of logits", targets_T.numel(), logits_TV.size(0));
  if (!logits_TV.is_cpu()) return softmax_loss_aten(logits_TV, targets_T, gradient);
  const std::int64_t width = logits_TV.size(1);
  const at::Tensor targets = targets_T.contiguous();
  at::Tensor losses_T = at::empty({logits_TV.size(0)}, logits_TV.options().dtype(at::kDouble));
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, logits_TV.scalar_type(), "softmax_loss", [&] {
    const auto* target = targets.const_data_ptr<std::int64_t>();
    auto* logits = logits_TV.mutable_data_ptr<scalar_t>();
    auto* losses = losses_T.mutable_data_ptr<double>();
    for (std::int64_t t = 0; t < targets.numel(); ++t) {
      COLLEGIUM_CHECK(target[t] == kNoTarget || (target[t] >= 0 && target[t] < width),
                      "target {} at row {} of a vocabulary of {}", target[t], t, width);
    }
    at::parallel_for(0, logits_TV.size(0), kLossRowsPerTask, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t t = begin; t < end; ++t) {
        scalar_t* row = logits + t * width;
        if (target[t] == kNoTarget) {
          losses[t] = 0.0;
          if (gradient) std::fill_n(row, width, scalar_t(0));
        } else {
          losses[t] = row_loss(row, width, target[t], gradient);
        }
      }
    });
  });
  return losses_T;
}

at::Tensor softmax_loss_aten(at::Tensor& logits_TV, const at::Tensor& targets_T, bool gradient) {
  const auto wide = logits_TV.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor log_probs_TV = at::log_softmax(logits_TV, 1, wide);
  const at::Tensor no_target_T1 = (targets_T == kNoTarget).unsqueeze(1);
  const at::Tensor safe_T1 = targets_T.unsqueeze(1).masked_fill(no_target_T1, 0);
  const at::Tensor losses_T =
      -log_probs_TV.gather(1, safe_T1).masked_fill(no_target_T1, 0.0).squeeze(1).to(at::kDouble);
  if (gradient) {
    at::Tensor gradient_TV = log_probs_TV.exp();
    gradient_TV.scatter_add_(1, safe_T1, at::full({1, 1}, -1.0, gradient_TV.options()).expand_as(safe_T1));
    logits_TV.copy_(gradient_TV.masked_fill_(no_target_T1, 0.0));
  }
  return losses_T;
}

}  // namespace collegium::model
