// SPDX-License-Identifier: Apache-2.0
#include "collegium/ops/weight_gradients.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>

#include "collegium/base/error.h"
#include "collegium/ops/product.h"

namespace collegium::ops {

namespace {

void check(const at::Tensor& grad_RO, const at::Tensor& x_RI) {
  COLLEGIUM_CHECK(grad_RO.size(0) == x_RI.size(0), "{} gradient rows for {} rows", grad_RO.size(0),
                  x_RI.size(0));
}

// A tile of an expert's weight gradient: some of its rows, all its columns.
struct OuterTile {
  ExpertRows rows;
  std::int64_t padded = 0;
  std::int64_t first = 0;  // row of the gradient
  std::int64_t count = 0;
};

// Few experts, or one with most rows, still make enough tasks; a small expert is one task. Products of more
// than some 10 ms are not padded: their kernel costs little beside them, and every worker has copies.
std::vector<OuterTile> cut_outer(const std::vector<ExpertRows>& experts, std::int64_t out, std::int64_t in,
                                 at::ScalarType dtype) {
  constexpr std::int64_t kTile = std::int64_t{1} << 29;  // multiply-adds, some milliseconds of a core
  constexpr std::int64_t kLargestPadded = std::int64_t{1} << 30;
  std::vector<OuterTile> tiles;
  for (const ExpertRows& rows : experts) {
    const std::int64_t parts = std::clamp(rows.rows * in * out / kTile, std::int64_t{1},
                                          std::max(std::int64_t{1}, out / kMostGemmRows));
    for (std::int64_t part = 0; part < parts; ++part) {
      const std::int64_t first = out * part / parts;
      const std::int64_t count = out * (part + 1) / parts - first;
      const bool large = rows.rows * in * count > kLargestPadded;
      tiles.push_back({.rows = rows,
                       .padded = large ? rows.rows : padded_rows(rows.rows, dtype),
                       .first = first,
                       .count = count});
    }
  }
  return tiles;
}

// A worker's zero-padded copies of an expert's rows.
class PaddedRows {
 public:
  PaddedRows(std::int64_t most_rows, std::int64_t width, const at::Tensor& like)
      : buffers_(at::empty({at::get_num_threads(), most_rows * width}, like.options())) {}

  at::Tensor of(const at::Tensor& rows, std::int64_t padded, std::int64_t worker) const {
    if (rows.size(0) == padded) return rows;
    const at::Tensor copy =
        buffers_.select(0, worker).narrow(0, 0, padded * rows.size(1)).view({padded, rows.size(1)});
    copy.narrow(0, 0, rows.size(0)).copy_(rows);
    copy.narrow(0, rows.size(0), padded - rows.size(0)).zero_();
    return copy;
  }

 private:
  at::Tensor buffers_;
};

}  // namespace

std::int64_t padded_rows(std::int64_t rows, at::ScalarType dtype) {
  if (dtype != at::kBFloat16) return rows;
  std::int64_t step = kSizeStep;
  while (rows > kSizeStep * step) step *= 2;
  return (rows + step - 1) / step * step;
}

void outer_into(const std::vector<ExpertRows>& experts, const at::Tensor& grad_RO, const at::Tensor& x_RI,
                const at::Tensor& grad_EOI) {
  check(grad_RO, x_RI);
  const auto tiles = cut_outer(experts, grad_RO.size(1), x_RI.size(1), product_dtype(x_RI));
  std::int64_t most_rows = 0;
  std::int64_t widest = 0;
  for (const OuterTile& tile : tiles) {
    if (tile.padded != tile.rows.rows) most_rows = std::max(most_rows, tile.padded);
    widest = std::max(widest, tile.count);
  }
  const PaddedRows grads(most_rows, widest, grad_RO);
  const PaddedRows inputs(most_rows, x_RI.size(1), x_RI);
  run_tasks(static_cast<std::int64_t>(tiles.size()), [&](std::int64_t i, std::int64_t worker) {
    const OuterTile& tile = tiles[static_cast<std::size_t>(i)];
    const at::Tensor grad_OI = grad_EOI.select(0, tile.rows.expert).narrow(0, tile.first, tile.count);
    if (tile.rows.rows == 0) {
      grad_OI.zero_();
      return;
    }
    const at::Tensor grad = tile.rows.of(grad_RO).narrow(1, tile.first, tile.count);
    product_into(grads.of(grad, tile.padded, worker).t(), inputs.of(tile.rows.of(x_RI), tile.padded, worker),
                 grad_OI);
  });
}

void outer_into_aten(const std::vector<ExpertRows>& experts, const at::Tensor& grad_RO,
                     const at::Tensor& x_RI, const at::Tensor& grad_EOI) {
  check(grad_RO, x_RI);
  for (const ExpertRows& rows : experts) {
    const at::Tensor grad_OI = grad_EOI.select(0, rows.expert);
    if (rows.rows == 0) {
      grad_OI.zero_();
    } else {
      product_into(rows.of(grad_RO).t(), rows.of(x_RI), grad_OI);
    }
  }
}

}  // namespace collegium::ops
