// SPDX-License-Identifier: Apache-2.0
#include "collegium/train/non_finite.h"

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/isfinite.h>

#include <cmath>

#include "collegium/base/error.h"

namespace collegium::train {

namespace {

const char* kind_of(double value) { return std::isnan(value) ? "nan" : "infinite"; }

bool is_finite(const at::Tensor& tensor) { return at::isfinite(tensor).all().item<bool>(); }

// The cross-entropy is finite, so only sums over the routers' scores and logits can be at fault.
[[noreturn]] void explain_balance(const NonFiniteLoss& loss, const model::ModelConfig& config) {
  std::string text = fmt::format("step {}: the balance loss is {}", loss.step, kind_of(loss.balance.total));
  for (const auto& [name, value] : loss.balance.terms) {
    if (!std::isfinite(value)) text += fmt::format(", its term {} is {}", name, kind_of(value));
  }
  for (std::size_t i = 0; i < loss.layers.size(); ++i) {
    const moe::LayerStatistics& layer = loss.layers[i];
    moe::RouterTotals totals = layer.totals;
    if (is_finite(totals.values())) continue;
    text += fmt::format(
        ": the router's sums of layer {} are the first that are not finite; its largest logit "
        "here is {:.3g}",
        model::layer_number(config, i), layer.local.max_abs_logit);
    break;
  }
  throw Error(text);
}

}  // namespace

void explain_non_finite(const NonFiniteLoss& loss, const model::Decoder& decoder, const MicroBatch& batch,
                        const model::ForwardOptions& options, const parallel::Groups& groups) {
  const at::NoGradGuard no_grad;
  if (std::isfinite(loss.cross_entropy)) explain_balance(loss, decoder.config());
  const std::string head = fmt::format("step {}: the loss is {}", loss.step, kind_of(loss.cross_entropy));
  for (const model::Parameter& parameter : decoder.parameters()) {
    if (!is_finite(parameter.value))
      throw Error(fmt::format("{}: parameter {} is not finite", head, parameter.name));
  }
  groups.world->barrier();
  const auto require_finite = [&](const std::string& what, const at::Tensor& value) {
    if (!is_finite(value)) throw Error(fmt::format("{}: {} is the first that is not finite", head, what));
  };
  model::ForwardOptions watched = options;
  watched.observer = [&](const std::string& what, const at::Tensor& value) {
    require_finite("the " + what, value);
  };
  const model::ForwardResult forward = decoder.forward(batch.ids_BS, watched);
  for (std::int64_t b = 0; b < batch.ids_BS.size(0); ++b)
    require_finite("the output of lm_head (the logits)", decoder.logits(forward.hidden_BSD.select(0, b)));
  if (std::isfinite(loss.local_cross_entropy) && groups.world->size() > 1) groups.world->barrier();
  throw Error(fmt::format("{}: the logits are finite, their cross-entropy is not", head));
}

}  // namespace collegium::train
