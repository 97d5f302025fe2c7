// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "collegium/ops/product.h"

namespace collegium::test {

/// While it lives, products are computed as on a machine that has these.
class AssumeBf16Products {
 public:
  explicit AssumeBf16Products(ops::Bf16Products products) { ops::assume_bf16_products(products); }
  ~AssumeBf16Products() { ops::assume_bf16_products(std::nullopt); }
  AssumeBf16Products(const AssumeBf16Products&) = delete;
  AssumeBf16Products& operator=(const AssumeBf16Products&) = delete;
};

}  // namespace collegium::test
