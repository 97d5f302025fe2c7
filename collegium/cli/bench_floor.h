// SPDX-License-Identifier: Apache-2.0
#pragma once

// The bound that a layer's time is compared with: its matrix products and nothing else.

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <span>
#include <vector>

namespace collegium::cli {

/// The nine products of every expert's forward and backward pass (gate, up, down; the gradients of their
/// inputs and of their weights), each one at::mm_out on contiguous matrices of the actual row counts, in the
/// dtype that products are computed in (ops::product_dtype). Every tensor of the layer is one piece of memory
/// here too, so caches see as many bytes unless bf16 is widened.
class GemmFloor {
 public:
  GemmFloor(std::span<const std::int64_t> row_counts_L, std::int64_t hidden, std::int64_t ffn,
            at::ScalarType dtype);

  /// All threads inside each product, seconds.
  double inside() const;
  /// Experts taken from a queue by the threads, one thread per product, seconds.
  double across() const;

 private:
  struct Product {
    at::Tensor out, a, b;
  };
  static constexpr std::size_t kProducts = 9;

  std::vector<std::array<Product, kProducts>> experts_;
};

}  // namespace collegium::cli
