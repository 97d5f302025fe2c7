// SPDX-License-Identifier: Apache-2.0
#pragma once

// What every way of multiplying must give.

#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <gtest/gtest.h>

#include <functional>
#include <limits>

#include "tests/support/tensors.h"

namespace collegium::test {

/// out = a b within the roundings of its sums, whose terms may cancel, and of its result.
inline void expect_product(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b) {
  const at::Tensor wide_a = a.to(at::kDouble);
  const at::Tensor wide_b = b.to(at::kDouble);
  const at::Tensor exact = wide_a.mm(wide_b);
  const auto norm = [](const at::Tensor& x) { return x.norm().item<double>(); };
  const at::ScalarType sums = out.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  EXPECT_LE(norm(out.to(at::kDouble) - exact),
            bound(out.scalar_type(), 1) * norm(exact) +
                bound(sums, a.size(1)) * norm(wide_a.abs().mm(wide_b.abs())));
}

using MultiplyInto = std::function<void(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out)>;
/// Rows with such numbers get them, other rows do not.
inline void expect_not_a_number_and_infinity_stay(const MultiplyInto& multiply_into) {
  at::Tensor a = random_tensor("a", {3, 4}, at::kBFloat16);
  a[1][2] = std::numeric_limits<double>::quiet_NaN();
  a[2][0] = std::numeric_limits<double>::infinity();
  const at::Tensor out = at::empty({3, 2}, at::kBFloat16);
  multiply_into(a, at::ones({4, 2}, at::kBFloat16), out);
  EXPECT_TRUE(out[0].isfinite().all().item<bool>());
  EXPECT_TRUE(out[1].isnan().all().item<bool>());
  EXPECT_TRUE(out[2].isinf().all().item<bool>());
}

}  // namespace collegium::test
