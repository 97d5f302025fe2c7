// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "collegium/ops/product.h"

namespace collegium::test {

/// While it lives, products are computed as on a machine with or without bf16 instructions.
class AssumeBf16Products {
 public:
  explicit AssumeBf16Products(bool has) { ops::assume_bf16_products(has); }
  ~AssumeBf16Products() { ops::assume_bf16_products(std::nullopt); }
  AssumeBf16Products(const AssumeBf16Products&) = delete;
  AssumeBf16Products& operator=(const AssumeBf16Products&) = delete;
};

}  // namespace collegium::test
