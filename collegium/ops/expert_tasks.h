// SPDX-License-Identifier: Apache-2.0
#pragma once

// How the experts' work is cut into tasks of one thread each. The cuts depend on the rows per expert alone,
// never on threads or timings; but a task that is alone may use all threads inside ATen's product. Whole
// experts would be too few tasks where experts are few or one of them has most rows; all threads inside each
// GEMM wait for each other at its end.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <vector>

namespace collegium::ops {

/// Consecutive rows of one expert.
struct ExpertRows {
  std::int64_t expert = 0;
  std::int64_t begin = 0;  ///< first row, counted over all experts
  std::int64_t rows = 0;

  std::int64_t end() const { return begin + rows; }
  /// These rows of a tensor over all rows; undefined stays undefined.
  at::Tensor of(const at::Tensor& all_RX) const {
    return all_RX.defined() ? all_RX.narrow(0, begin, rows) : all_RX;
  }
};

/// What     Every expert's rows in one piece, experts without rows too.
/// Shape    counts_E int64 on the CPU.
std::vector<ExpertRows> rows_of_experts(const at::Tensor& counts_E);

/// What     Rows that one GEMM takes: a 16th of all rows, so that several cores have work and experts that
///          differ even out, but at least 256 and at most 512, a multiple of kSizeStep: the GEMM brings its
///          weights into another order once for all of them. Whole bf16 products are short where a core has
///          the instructions: a 64th is more even, and SwiGLU finds their result in the core's own cache.
///          `dtype` is product_dtype().
std::int64_t gemm_rows(std::int64_t num_rows, at::ScalarType dtype);
inline constexpr std::int64_t kSizeStep = 32;
inline constexpr std::int64_t kMostGemmRows = 512;

/// What     Rows rounded up to one of few numbers: multiples of 32 up to 1024, of a 32nd of them above. So
///          what is made for exact sizes is made seldom, though rows per expert differ in every step.
std::int64_t rounded_rows(std::int64_t rows);

/// What     Rows for the forward pass and the rows' gradients: gemm_rows() each, an expert's last piece
///          less than twice as many. Experts without rows have none.
std::vector<ExpertRows> cut_rows(const at::Tensor& counts_E, at::ScalarType dtype);
/// What     The pieces of one expert's rows.
std::vector<ExpertRows> cut_rows(const ExpertRows& expert, std::int64_t most_rows);

/// What     The GEMMs of one piece of cut_rows(). Where bf16 products are whole their sizes are multiples of
///          kSizeStep, so that few kernels have to be generated (each costs as much time as a small GEMM
///          and up to 0.6 MB): the last one begins earlier and computes rows a second time, unless the
///          piece is shorter than it. `dtype` is product_dtype().
std::vector<ExpertRows> gemms_of(const ExpertRows& piece, std::int64_t most_rows, at::ScalarType dtype);

/// What     Calls task(i, worker) for i < num_tasks, in any order, from at most at::get_num_threads()
///          workers. A single task runs on the caller, so that GEMMs of ATen's may use all threads in it.
void run_tasks(std::int64_t num_tasks,
               const std::function<void(std::int64_t task, std::int64_t worker)>& task);

}  // namespace collegium::ops
