// SPDX-License-Identifier: Apache-2.0
#pragma once

// Matrix products in the compute dtype. Cores without bf16 instructions emulate bf16 products at a fifth of
// the rate of fp32 ones (measured with AVX-512, oneDNN 3): there the operands are widened to fp32 and the
// result is rounded once. Every way multiplies the same numbers and adds in fp32.

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <optional>

#include "collegium/ops/tile_product.h"

namespace collegium::ops {

/// Values of the second factor that one product widens at a time: 16 MiB as fp32.
inline constexpr std::int64_t kMostWidened = std::int64_t{1} << 22;

/// How this machine multiplies bf16 matrices: by widening to fp32, with the vector instructions of
/// AVX-512-bf16, or with AMX tiles (ops/tile_product.h), several times as fast, so that whatever prepares
/// operands weighs more.
enum class Bf16Products { kWidened, kVectors, kTiles };
inline constexpr std::array kAllBf16Products = {Bf16Products::kWidened, Bf16Products::kVectors,
                                                Bf16Products::kTiles};

/// What     What the machine has. Other architectures than x86 are taken to have kVectors: what ATen chooses
///          there was not measured.
Bf16Products bf16_products();
/// What     From now on bf16_products() answers this; nullopt = what the machine has. Every way is right
///          everywhere, so that tests run all on every machine.
void assume_bf16_products(std::optional<Bf16Products> products);

/// What     The dtype that products of CPU tensors are computed in: fp32 for bf16 where it is widened.
at::ScalarType product_dtype(at::ScalarType dtype);
/// The same of a tensor's: its own on other devices.
at::ScalarType product_dtype(const at::Tensor& operand);

/// What     Whether products of these are computed on tiles here, on the calling thread alone.
bool multiplies_in_tiles(const at::Tensor& a, const at::Tensor& b);

/// What     out = a b, into memory that is there already, such as some rows of a larger tensor. `reuse`
///          says when `out` is read again.
/// Shape    a [M, K], b [K, N], out [M, N], any strides.
/// Dtype    a and b in that of `out` or in its product_dtype().
void product_into(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out,
                  Reuse reuse = Reuse::kSoon);
/// The same by widening to fp32, whatever the machine has: of a large b some columns at a time.
void widened_product_into(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out);

/// What     a b, on all threads.
/// Shape    a [M, K], b [K, N] -> [M, N] in the dtype of a; b may be in its product_dtype().
at::Tensor product(const at::Tensor& a, const at::Tensor& b);
/// The same by widening to fp32, tile by tile of the result, whatever the machine has. Tiles depend on the
/// shapes alone.
at::Tensor widened_product(const at::Tensor& a, const at::Tensor& b);

}  // namespace collegium::ops
