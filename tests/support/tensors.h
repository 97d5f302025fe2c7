// SPDX-License-Identifier: Apache-2.0
#pragma once

// Random inputs, distances and computed tolerances for tests.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <string_view>

#include "collegium/base/rng.h"
#include "collegium/ops/reference/reference.h"

namespace collegium::test {

/// Normal numbers that depend on the name only.
inline at::Tensor random_tensor(std::string_view name, at::IntArrayRef shape,
                                at::ScalarType dtype = at::kDouble) {
  at::Tensor values = at::empty(shape, at::kDouble);
  const RandomStream stream(7, name);
  auto* out = values.mutable_data_ptr<double>();
  for (std::int64_t i = 0; i < values.numel(); ++i) out[i] = stream.normal(static_cast<std::uint64_t>(i));
  return values.to(dtype);
}

inline ops::reference::Matrix to_matrix(const at::Tensor& tensor) {
  const at::Tensor wide = tensor.detach().to(at::kDouble).contiguous();
  ops::reference::Matrix matrix(wide.size(0), wide.size(1));
  std::copy_n(wide.const_data_ptr<double>(), wide.numel(), matrix.values.begin());
  return matrix;
}

/// ||a - b|| / ||b||, absolute where b vanishes.
inline double relative_difference(const at::Tensor& a, const at::Tensor& b) {
  const double scale = b.to(at::kDouble).norm().item<double>();
  const double distance = (a.to(at::kDouble) - b.to(at::kDouble)).norm().item<double>();
  return scale > 1e-12 ? distance / scale : distance;
}

inline double epsilon(at::ScalarType dtype) {
  if (dtype == at::kDouble) return std::numeric_limits<double>::epsilon();
  return dtype == at::kFloat ? static_cast<double>(std::numeric_limits<float>::epsilon())
                             : 1.0 / 128;  // bf16: 2^-7
}

/// A bound for a relative error: one epsilon for every one of the `length` roundings on the longest path.
inline double bound(at::ScalarType dtype, std::int64_t length) {
  return epsilon(dtype) * static_cast<double>(length);
}

}  // namespace collegium::test
