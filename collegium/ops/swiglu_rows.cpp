// SPDX-License-Identifier: Apache-2.0
#include "collegium/ops/swiglu_rows.h"

#include <algorithm>
#include <array>
#include <type_traits>

#include "collegium/ops/round.h"

namespace collegium::ops {

namespace {

using row_math::Wide;
using row_math::widen;

// A pass's results before they are rounded, or, of a type that needs no rounding, where they belong.
template <typename T>
class Results {
 public:
  explicit Results(T* out) : out_(out) {}
  Wide<T>* values() {
    if constexpr (std::is_same_v<T, c10::BFloat16>) {
      return values_.data();
    } else {
      return out_;
    }
  }
  void round(std::int64_t count) {
    if constexpr (std::is_same_v<T, c10::BFloat16>) round_values(values_.data(), count, out_);
  }

 private:
  T* out_;
  std::array<float, kSwigluColumns> values_;
};

template <typename T>
COLLEGIUM_INLINE void forward_rows(const SwigluPart<T>& o) {
  using W = Wide<T>;
  for (std::int64_t row = 0; row < o.rows; ++row) {
    const W weight = o.weights != nullptr ? o.weights[row] : W{1};
    for (std::int64_t first = 0; first < o.columns; first += kSwigluColumns) {
      const std::int64_t columns = std::min(kSwigluColumns, o.columns - first);
      const T* gates = o.gate.at(row, first);
      const T* ups = o.up.at(row, first);
      Results<T> results(o.activation.at(row, first));
      W* __restrict__ out = results.values();
      for (std::int64_t f = 0; f < columns; ++f) {
        const W gate = widen(gates[f]);
        const W silu = gate * row_math::sigmoid(gate);
        out[f] = weight * (silu * widen(ups[f]));
      }
      results.round(columns);
    }
  }
}

// `keep` writes the activation too.
template <bool keep, typename T>
COLLEGIUM_INLINE void backward_rows(const SwigluBackwardPart<T>& o) {
  using W = Wide<T>;
  std::array<W, kSwigluColumns> terms;
  W* __restrict__ term = terms.data();
  for (std::int64_t row = 0; row < o.forward.rows; ++row) {
    const W weight = o.forward.weights != nullptr ? o.forward.weights[row] : W{1};
    W dot{o.adds ? o.grad_weights[row] : W{0}};
    for (std::int64_t first = 0; first < o.forward.columns; first += kSwigluColumns) {
      const std::int64_t columns = std::min(kSwigluColumns, o.forward.columns - first);
      const T* gate = o.forward.gate.at(row, first);
      const T* up = o.forward.up.at(row, first);
      const T* grad = o.grad.at(row, first);
      Results<T> grad_gates(o.grad_gate.at(row, first));
      Results<T> grad_ups(o.grad_up.at(row, first));
      Results<T> activations(keep ? o.forward.activation.at(row, first) : nullptr);
      W* __restrict__ grad_gate = grad_gates.values();
      W* __restrict__ grad_up = grad_ups.values();
      W* __restrict__ activation = activations.values();
#pragma GCC ivdep
      for (std::int64_t f = 0; f < columns; ++f) {
        const W g = widen(gate[f]);
        const W u = widen(up[f]);
        const W da = widen(grad[f]);
        const W s = row_math::sigmoid(g);
        const W silu = g * s;
        const W product = silu * u;
        grad_gate[f] = weight * da * u * s * (W{1} + g * (W{1} - s));
        grad_up[f] = weight * da * silu;
        if constexpr (keep) activation[f] = weight * product;
        term[f] = da * product;
      }
      grad_gates.round(columns);
      grad_ups.round(columns);
      if constexpr (keep) activations.round(columns);
      dot += row_math::lane_sum<W>(columns, [term](std::int64_t f) { return term[f]; });
    }
    if (o.grad_weights != nullptr) o.grad_weights[row] = dot;
  }
}

COLLEGIUM_CLONES void backward(const SwigluBackwardPart<double>& o) { backward_rows<false>(o); }
COLLEGIUM_CLONES void backward(const SwigluBackwardPart<float>& o) { backward_rows<false>(o); }
COLLEGIUM_CLONES void backward(const SwigluBackwardPart<c10::BFloat16>& o) { backward_rows<false>(o); }
COLLEGIUM_CLONES void backward_keep(const SwigluBackwardPart<double>& o) { backward_rows<true>(o); }
COLLEGIUM_CLONES void backward_keep(const SwigluBackwardPart<float>& o) { backward_rows<true>(o); }
COLLEGIUM_CLONES void backward_keep(const SwigluBackwardPart<c10::BFloat16>& o) { backward_rows<true>(o); }

template <typename T>
void backward_part(const SwigluBackwardPart<T>& part) {
  if (part.forward.activation.values != nullptr) {
    backward_keep(part);
  } else {
    backward(part);
  }
}

}  // namespace

COLLEGIUM_CLONES void swiglu_part(const SwigluPart<double>& part) { forward_rows(part); }
COLLEGIUM_CLONES void swiglu_part(const SwigluPart<float>& part) { forward_rows(part); }
COLLEGIUM_CLONES void swiglu_part(const SwigluPart<c10::BFloat16>& part) { forward_rows(part); }

void swiglu_backward_part(const SwigluBackwardPart<double>& part) { backward_part(part); }
void swiglu_backward_part(const SwigluBackwardPart<float>& part) { backward_part(part); }
void swiglu_backward_part(const SwigluBackwardPart<c10::BFloat16>& part) { backward_part(part); }

}  // namespace collegium::ops
