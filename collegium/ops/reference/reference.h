// SPDX-License-Identifier: Apache-2.0
#pragma once

// Slow, obvious oracles: plain loops in double precision. Tests compare the kernels with them, on any inputs.

#include <cstdint>
#include <vector>

namespace collegium::ops::reference {

/// A dense matrix, row by row.
struct Matrix {
  std::int64_t rows = 0;
  std::int64_t columns = 0;
  std::vector<double> values;

  Matrix() = default;
  Matrix(std::int64_t num_rows, std::int64_t num_columns)
      : rows(num_rows), columns(num_columns), values(static_cast<std::size_t>(num_rows * num_columns), 0.0) {}
  double& at(std::int64_t row, std::int64_t column) {
    return values[static_cast<std::size_t>(row * columns + column)];
  }
  double at(std::int64_t row, std::int64_t column) const {
    return values[static_cast<std::size_t>(row * columns + column)];
  }
};

/// What     The k best columns of a row: score descending, column ascending, NaN lowest; by repeated maximum.
std::vector<std::int64_t> topk(const std::vector<double>& scores, std::int64_t k);

/// What     exp(z_e) / sum_i exp(z_i) of a row.
std::vector<double> softmax(const std::vector<double>& logits);

/// What     W x for one row: y[o] = sum_i w[o, i] x[i].
std::vector<double> matrix_vector(const Matrix& w, const std::vector<double>& x);

/// What     One expert: down(silu(gate x) * up x), with gate_up [2F, D] and down [D, F].
std::vector<double> expert(const Matrix& gate_up, const Matrix& down, const std::vector<double>& x);

/// What     z / (1 + exp(-z)).
double silu(double z);

}  // namespace collegium::ops::reference
