// SPDX-License-Identifier: Apache-2.0
#include "collegium/ops/reference/reference.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace collegium::ops::reference {

std::vector<std::int64_t> topk(const std::vector<double>& scores, std::int64_t k) {
  std::vector<std::int64_t> chosen;
  for (std::int64_t round = 0; round < k; ++round) {
    std::int64_t best = -1;
    double best_score = 0.0;
    for (std::size_t column = 0; column < scores.size(); ++column) {
      const auto id = static_cast<std::int64_t>(column);
      if (std::find(chosen.begin(), chosen.end(), id) != chosen.end()) continue;
      const double score =
          std::isnan(scores[column]) ? -std::numeric_limits<double>::infinity() : scores[column];
      if (best < 0 || score > best_score) {
        best = id;
        best_score = score;
      }
    }
    chosen.push_back(best);
  }
  return chosen;
}

std::vector<double> softmax(const std::vector<double>& logits) {
  const double most = *std::max_element(logits.begin(), logits.end());
  std::vector<double> probs;
  double sum = 0.0;
  for (const double logit : logits) {
    probs.push_back(std::exp(logit - most));
    sum += probs.back();
  }
  for (double& prob : probs) prob /= sum;
  return probs;
}

std::vector<double> matrix_vector(const Matrix& w, const std::vector<double>& x) {
  std::vector<double> y(static_cast<std::size_t>(w.rows), 0.0);
  for (std::int64_t o = 0; o < w.rows; ++o) {
    for (std::int64_t i = 0; i < w.columns; ++i)
      y[static_cast<std::size_t>(o)] += w.at(o, i) * x[static_cast<std::size_t>(i)];
  }
  return y;
}

double silu(double z) { return z / (1.0 + std::exp(-z)); }

std::vector<double> expert(const Matrix& gate_up, const Matrix& down, const std::vector<double>& x) {
  const std::vector<double> hidden = matrix_vector(gate_up, x);
  const std::size_t width = hidden.size() / 2;
  std::vector<double> activation(width);
  for (std::size_t f = 0; f < width; ++f) activation[f] = silu(hidden[f]) * hidden[width + f];
  return matrix_vector(down, activation);
}

}  // namespace collegium::ops::reference
