// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <c10/core/ScalarType.h>

namespace collegium::ops {

/// What     The best rate of a square GEMM on all threads, ATen's or our own (ops/product.h), FLOP/s (a
///          multiply-add counts two), in the dtype that products of `dtype` are computed in: the bound that
///          training speeds are compared with. Takes about 0.3 s.
double measure_gemm_peak(at::ScalarType dtype);

}  // namespace collegium::ops
