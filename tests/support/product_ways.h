// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ostream>

#include "collegium/ops/product.h"

namespace collegium::ops {

// NOLINTNEXTLINE(readability-identifier-naming): GoogleTest looks for this name
inline void PrintTo(const ProductWays& ways, std::ostream* out) {
  *out << (ways.widen_bf16 ? "bf16 widened" : "bf16 as it is") << (ways.blocks ? ", in blocks" : ", whole");
}

}  // namespace collegium::ops

namespace collegium::test {

/// While it lives, products are computed as on a machine that multiplies so.
class AssumeProductWays {
 public:
  explicit AssumeProductWays(ops::ProductWays ways) { ops::assume_product_ways(ways); }
  ~AssumeProductWays() { ops::assume_product_ways(std::nullopt); }
  AssumeProductWays(const AssumeProductWays&) = delete;
  AssumeProductWays& operator=(const AssumeProductWays&) = delete;
};

}  // namespace collegium::test
