// SPDX-License-Identifier: Apache-2.0
#pragma once

// Learned noisy top-K gating and its smooth load [Shazeer2017, Eqs 3-5 and Appendix A] arXiv 1701.06538.

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace collegium::moe {

/// H = clean + normal * std, std = softplus(x W_noise^T) + 0.01.
struct NoisyLogits {
  at::Tensor clean_TE;
  at::Tensor raw_std_TE;  ///< x W_noise^T
  at::Tensor std_TE;
  at::Tensor normal_TE;
  at::Tensor noisy_TE;
};
/// What     H from the clean logits, x W_noise^T and one standard normal number per token and expert, all
///          [T, E].
NoisyLogits add_learned_noise(const at::Tensor& clean_TE, const at::Tensor& raw_std_TE,
                              const at::Tensor& normal_TE);

/// What     P(x, i): the probability, over a new draw of i's noise, that i is among the top K while the
///          others stay.
/// Math     Phi((clean_i - kth_excluding(H, K, i)) / std_i); kth_excluding is the (K+1)-th largest H when i
///          is in the top K, else the K-th largest. K = E has no threshold: every P is 1, without gradient.
/// Shape    [T, E], 1 <= K <= E.
struct SmoothLoad {
  at::Tensor probability_TE;
  at::Tensor z_TE;             ///< argument of Phi; undefined when K = E
  at::Tensor threshold_id_TE;  ///< int64: whose H is the threshold
};
/// What     The smooth load of every token and expert, from the logits of one forward pass.
SmoothLoad smooth_load(const NoisyLogits& logits, std::int64_t top_k);

/// Gradients with respect to clean_TE and raw_std_TE.
struct NoisyGradients {
  at::Tensor clean_TE;
  at::Tensor raw_std_TE;
};
/// What     From dLoss/dH and, optionally, dLoss/dP (undefined = none).
NoisyGradients noisy_backward(const NoisyLogits& logits, const SmoothLoad& load,
                              const at::Tensor& grad_noisy_TE, const at::Tensor& grad_probability_TE);

}  // namespace collegium::moe
