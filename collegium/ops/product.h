// SPDX-License-Identifier: Apache-2.0
#pragma once

// Matrix products in the compute dtype. Cores without bf16 instructions emulate bf16 products at a fifth of
// the rate of fp32 ones (measured with AVX-512, oneDNN 3): there the operands are widened to fp32 and the
// result is rounded once. Every way multiplies the same numbers and adds in fp32.

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <optional>

#include "collegium/ops/block_product.h"

namespace collegium::ops {

/// Values of the second factor that one product widens at a time: 16 MiB as fp32.
inline constexpr std::int64_t kMostWidened = std::int64_t{1} << 22;

/// How this machine multiplies.
struct ProductWays {
  bool widen_bf16;  ///< bf16 in fp32, for want of instructions
  bool blocks;      ///< bf16 and fp32 products block by block (ops/block_product.h), else whole
};
inline constexpr std::array<ProductWays, 4> kAllProductWays = {{{.widen_bf16 = false, .blocks = false},
                                                                {.widen_bf16 = false, .blocks = true},
                                                                {.widen_bf16 = true, .blocks = false},
                                                                {.widen_bf16 = true, .blocks = true}}};

/// What     What the machine has. Other architectures than x86 are taken not to widen and to multiply whole:
///          what ATen chooses there was not measured.
ProductWays product_ways();
/// What     From now on product_ways() answers this; nullopt = what the machine has. Every way is right
///          everywhere, so that tests run all on every machine.
void assume_product_ways(std::optional<ProductWays> ways);

/// What     The dtype that products of CPU tensors are computed in: fp32 for bf16 where it is widened.
at::ScalarType product_dtype(at::ScalarType dtype);
/// The same of a tensor's: its own on other devices.
at::ScalarType product_dtype(const at::Tensor& operand);

/// What     Whether products read such values by an index where they lie; elsewhere rows are gathered first.
bool products_take_index(const at::Tensor& values);
/// What     Whether product() has other means for such values than ATen's whole product.
bool products_are_own(const at::Tensor& values);
/// What     Whether products of these are computed block by block here.
bool multiplies_in_blocks(const RowSource& a, const RowSource& b);

/// What     out = a b, into memory that is there already, such as some rows of a larger tensor, for a task
///          that has one thread or is alone. `reuse` says when `out` is read again.
/// Shape    a [X, I], b [I, O], out [X, O], any strides.
/// Dtype    a and b in that of `out` or in its product_dtype().
void product_into(const RowSource& a, const RowSource& b, const at::Tensor& out, Reuse reuse = Reuse::kSoon);
/// The same by widening to fp32, whatever the machine has: of a large b some columns at a time.
void widened_product_into(const RowSource& a, const RowSource& b, const at::Tensor& out,
                          Reuse reuse = Reuse::kSoon);

/// What     a b, on all threads; tile by tile of the result where that is faster, and then the same whatever
///          the tiles are.
/// Shape    a [X, I], b [I, O] -> [X, O] in the dtype of a; b may be in its product_dtype().
at::Tensor product(const at::Tensor& a, const at::Tensor& b);
/// The same by widening to fp32, tile by tile of the result, whatever the machine has. Tiles depend on the
/// shapes alone.
at::Tensor widened_product(const at::Tensor& a, const at::Tensor& b);

}  // namespace collegium::ops
