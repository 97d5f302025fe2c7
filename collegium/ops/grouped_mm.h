// SPDX-License-Identifier: Apache-2.0
#pragma once

// One GEMM per expert over rows that are grouped by expert: rows of expert e are [offset_e, offset_e +
// counts_e).

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace collegium::ops {

/// How the experts' GEMMs share the threads.
enum class GemmSchedule { kInside, kAcross };

/// What     The schedule for E experts: kAcross (one thread per GEMM, experts taken from a queue) when there
/// are at least two
///          experts with rows per thread, each GEMM is small (rows x in x out <= 2^28 multiply-adds) and no
///          expert holds more than half a thread's share of the rows; else kInside (all threads in each
///          GEMM). A pure function of its arguments: never of timings, so reruns are bit-identical.
GemmSchedule choose_schedule(const at::Tensor& counts_E, std::int64_t in, std::int64_t out,
                             std::int64_t num_threads);

/// What     y[r] = W_e x[r]: forward.
/// Shape    x_RI [R, I], w_EOI [E, O, I], counts_E int64 on the CPU, sum = R -> [R, O].
at::Tensor grouped_mm(const at::Tensor& x_RI, const at::Tensor& w_EOI, const at::Tensor& counts_E);

/// What     dx[r] = W_e^T dy[r]: gradient of the rows.
/// Shape    grad_RO [R, O], w_EOI [E, O, I] -> [R, I].
at::Tensor grouped_mm_grad_rows(const at::Tensor& grad_RO, const at::Tensor& w_EOI,
                                const at::Tensor& counts_E);

/// What     dW_e = sum over e's rows of dy[r] x[r]^T; exactly zero for an expert without rows.
/// Shape    grad_RO [R, O], x_RI [R, I] -> [E, O, I].
at::Tensor grouped_mm_grad_weights(const at::Tensor& grad_RO, const at::Tensor& x_RI,
                                   const at::Tensor& counts_E);

}  // namespace collegium::ops
