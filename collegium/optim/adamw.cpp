// SPDX-License-Identifier: Apache-2.0
#include "collegium/optim/adamw.h"

#include <ATen/Parallel.h>

#include <cmath>
#include <limits>

#include "collegium/base/error.h"
#include "collegium/ops/row_math.h"

namespace collegium::optim {

namespace {

template <typename T>
struct Factors {
  T scale, beta1, beta2, rest1, rest2, epsilon, correction1, correction2, rate, decay;

  template <typename U>
  Factors<U> to() const {
    return {.scale = static_cast<U>(scale),
            .beta1 = static_cast<U>(beta1),
            .beta2 = static_cast<U>(beta2),
            .rest1 = static_cast<U>(rest1),
            .rest2 = static_cast<U>(rest2),
            .epsilon = static_cast<U>(epsilon),
            .correction1 = static_cast<U>(correction1),
            .correction2 = static_cast<U>(correction2),
            .rate = static_cast<U>(rate),
            .decay = static_cast<U>(decay)};
  }
};

// `frozen` is read only when kMasked.
template <bool kMasked, typename T, typename Value>
COLLEGIUM_INLINE void update_values(const Factors<T>& f, std::int64_t begin, std::int64_t end,
                                    T* __restrict__ w, T* __restrict__ g, T* __restrict__ m,
                                    T* __restrict__ v, Value* __restrict__ value, const bool* frozen) {
  for (std::int64_t i = begin; i < end; ++i) {
    if constexpr (kMasked) {
      if (frozen[i]) {
        g[i] = T{0};
        continue;
      }
    }
    const T gradient = f.scale * g[i];
    g[i] = T{0};
    m[i] = f.beta1 * m[i] + f.rest1 * gradient;
    v[i] = f.beta2 * v[i] + f.rest2 * gradient * gradient;
    const T direction = m[i] / f.correction1 / (std::sqrt(v[i] / f.correction2) + f.epsilon);
    w[i] -= f.rate * (direction + f.decay * w[i]);
    if constexpr (!std::is_same_v<T, Value>)
      value[i] = ops::row_math::narrow<Value>(static_cast<float>(w[i]));
  }
}

COLLEGIUM_CLONES void update(const Factors<float>& f, std::int64_t begin, std::int64_t end, float* w,
                             float* g, float* m, float* v, at::BFloat16* value) {
  update_values<false>(f, begin, end, w, g, m, v, value, nullptr);
}
COLLEGIUM_CLONES void update(const Factors<float>& f, std::int64_t begin, std::int64_t end, float* w,
                             float* g, float* m, float* v, float* value) {
  update_values<false>(f, begin, end, w, g, m, v, value, nullptr);
}
COLLEGIUM_CLONES void update(const Factors<double>& f, std::int64_t begin, std::int64_t end, double* w,
                             double* g, double* m, double* v, double* value) {
  update_values<false>(f, begin, end, w, g, m, v, value, nullptr);
}

template <typename T, typename Value>
void update_slot(const Factors<T>& factors, Slot& slot) {
  constexpr std::int64_t kValuesPerTask = 16384;
  auto* w = slot.master.mutable_data_ptr<T>();
  auto* g = slot.gradient.mutable_data_ptr<T>();
  auto* m = slot.first_moment.mutable_data_ptr<T>();
  auto* v = slot.second_moment.mutable_data_ptr<T>();
  auto* value = slot.value.mutable_data_ptr<Value>();
  const bool* frozen = slot.frozen.defined() ? slot.frozen.const_data_ptr<bool>() : nullptr;
  at::parallel_for(0, slot.master.numel(), kValuesPerTask, [&](std::int64_t begin, std::int64_t end) {
    if (frozen == nullptr) {
      update(factors, begin, end, w, g, m, v, value);
    } else {
      update_values<true>(factors, begin, end, w, g, m, v, value, frozen);
    }
  });
}

}  // namespace

void validate(const AdamWOptions& o, const std::string& path) {
  require_config(o.learning_rate > 0.0, "{}.learning_rate = {}: must be positive", path, o.learning_rate);
  require_config(o.beta1 >= 0.0 && o.beta1 < 1.0, "{}.beta1 = {}: must lie in [0, 1)", path, o.beta1);
  require_config(o.beta2 >= 0.0 && o.beta2 < 1.0, "{}.beta2 = {}: must lie in [0, 1)", path, o.beta2);
  // Below it may be 0 in fp32, and what never had a gradient would become 0 / 0.
  constexpr double kLeastEpsilon = std::numeric_limits<float>::min();
  require_config(o.epsilon >= kLeastEpsilon, "{}.epsilon = {}: must be at least {:.3g}", path, o.epsilon,
                 kLeastEpsilon);
  require_config(o.weight_decay >= 0.0, "{}.weight_decay = {}: must not be negative", path, o.weight_decay);
  require_config(o.clip_norm >= 0.0, "{}.clip_norm = {}: must not be negative (0 = no clipping)", path,
                 o.clip_norm);
}

void adamw_step(const AdamWOptions& o, double rate, double gradient_scale, std::int64_t step,
                std::vector<Slot>& slots) {
  const double correction1 = 1.0 - std::pow(o.beta1, static_cast<double>(step));
  const double correction2 = 1.0 - std::pow(o.beta2, static_cast<double>(step));
  for (Slot& slot : slots) {
    const bool decays = slot.kind != model::ParameterKind::kNorm || o.decay_norms;
    const Factors<double> factors{.scale = gradient_scale,
                                  .beta1 = o.beta1,
                                  .beta2 = o.beta2,
                                  // Of a beta that was rounded to fp32, 1 - beta would be another one.
                                  .rest1 = 1.0 - o.beta1,
                                  .rest2 = 1.0 - o.beta2,
                                  .epsilon = o.epsilon,
                                  .correction1 = correction1,
                                  .correction2 = correction2,
                                  .rate = rate,
                                  .decay = decays ? o.weight_decay : 0.0};
    if (slot.master.scalar_type() == at::kDouble) {
      update_slot<double, double>(factors, slot);
    } else if (slot.value.scalar_type() == at::kBFloat16) {
      update_slot<float, at::BFloat16>(factors.to<float>(), slot);
    } else {
      update_slot<float, float>(factors.to<float>(), slot);
    }
  }
}

}  // namespace collegium::optim
