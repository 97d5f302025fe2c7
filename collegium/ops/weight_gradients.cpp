// SPDX-License-Identifier: Apache-2.0
#include "collegium/ops/weight_gradients.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>

#include <algorithm>

#include "collegium/base/error.h"
#include "collegium/ops/permute.h"
#include "collegium/ops/product.h"
#include "collegium/ops/transpose.h"

namespace collegium::ops {

std::int64_t padded_rows(std::int64_t rows, at::ScalarType dtype) {
  return dtype == at::kBFloat16 ? rounded_rows(rows) : rows;
}

PaddedRows::PaddedRows(const std::vector<ExpertRows>& experts, const at::Tensor& like) : rows_(experts) {
  const at::ScalarType dtype = product_dtype(like);
  for (const ExpertRows& rows : experts) {
    COLLEGIUM_CHECK(padded_.empty() || padded_.back().expert < rows.expert, "expert {} after expert {}",
                    rows.expert, padded_.empty() ? -1 : padded_.back().expert);
    const std::int64_t padded = like.is_cpu() ? padded_rows(rows.rows, dtype) : rows.rows;
    padded_.push_back({.expert = rows.expert, .begin = total(), .rows = padded});
  }
}

ExpertRows PaddedRows::of(const ExpertRows& rows) const {
  const auto found =
      std::lower_bound(rows_.begin(), rows_.end(), rows.expert,
                       [](const ExpertRows& known, std::int64_t expert) { return known.expert < expert; });
  COLLEGIUM_CHECK(found != rows_.end() && found->expert == rows.expert, "no rows of expert {}", rows.expert);
  const ExpertRows& padded = padded_[static_cast<std::size_t>(found - rows_.begin())];
  return {.expert = rows.expert, .begin = rows.begin - found->begin + padded.begin, .rows = rows.rows};
}

void PaddedRows::clear_padding(const at::Tensor& values_ZX) const {
  for (std::size_t i = 0; i < rows_.size(); ++i)
    values_ZX.narrow(0, padded_[i].begin + rows_[i].rows, padded_[i].rows - rows_[i].rows).zero_();
}

RowSource PaddedRows::ordered(const RowSource& source) const {
  const bool in_place =
      total() == source.rows() &&
      std::equal(rows_.begin(), rows_.end(), padded_.begin(),
                 [](const auto& a, const auto& b) { return a.begin == b.begin && a.rows == b.rows; });
  const bool by_index = source.index_R.defined() && products_take_index(source.values_XD);
  if (in_place) return by_index ? source : source.tensor();
  if (by_index) {  // which takes no padding
    std::vector<at::Tensor> indices = {source.index_R.narrow(0, 0, 0)};
    for (const ExpertRows& rows : rows_) indices.push_back(rows.of(source.index_R));
    return {source.values_XD, at::cat(indices)};
  }
  at::Tensor out_ZD = at::empty({total(), source.width()}, source.values_XD.options());
  for (std::size_t i = 0; i < rows_.size(); ++i) {
    const at::Tensor copy = out_ZD.narrow(0, padded_[i].begin, rows_[i].rows);
    const RowSource rows = source.some_rows(rows_[i].begin, rows_[i].rows);
    if (rows.index_R.defined() && rows.values_XD.is_cpu()) {
      gather_rows_into(rows.values_XD, rows.index_R, copy);
    } else {
      copy.copy_(rows.tensor());
    }
  }
  clear_padding(out_ZD);
  return out_ZD;
}

namespace {

void check(const OuterProducts& products) {
  COLLEGIUM_CHECK(products.grad_ZO.rows() == products.x_ZI.rows(), "{} gradient rows for {} rows",
                  products.grad_ZO.rows(), products.x_ZI.rows());
}

void outer_product(const at::Tensor& grad_OZ, const RowSource& x_ZI, const at::Tensor& grad_OI) {
  if (x_ZI.rows() == 0) {
    grad_OI.zero_();
  } else {
    product_into(grad_OZ, x_ZI, grad_OI, Reuse::kLater);
  }
}

// A tile of an expert's weight gradient: some of its rows, all its columns.
struct OuterTile {
  const OuterProducts* products;
  ExpertRows rows;
  std::int64_t first;  // row of the gradient
  std::int64_t count;

  void compute(const WorkerTransposes& turned, std::int64_t worker) const {
    const at::Tensor grad_OI = products->grad_EOI.select(0, rows.expert).narrow(0, first, count);
    const RowSource grad_ZO = products->grad_ZO.some_columns(first, count);
    outer_product(turned.of(grad_ZO.some_rows(rows.begin, rows.rows), worker),
                  products->x_ZI.some_rows(rows.begin, rows.rows), grad_OI);
  }
};

// Few experts, or one with most rows, still make several tasks: at most one per kMostGemmRows rows of a
// gradient, each of some milliseconds of a core. Tiles are multiples of kSizeStep high, so that few kernels
// have to be made.
void cut_outer(const std::vector<ExpertRows>& experts, const OuterProducts& products,
               std::vector<OuterTile>& tiles) {
  constexpr std::int64_t kTile = std::int64_t{1} << 28;  // multiply-adds
  const std::int64_t out = products.grad_ZO.width();
  const std::int64_t in = products.x_ZI.width();
  for (const ExpertRows& rows : experts) {
    const std::int64_t parts = std::clamp(rows.rows * in * out / kTile, std::int64_t{1},
                                          std::max(std::int64_t{1}, out / kMostGemmRows));
    std::int64_t first = 0;
    for (std::int64_t part = 1; part <= parts; ++part) {
      const std::int64_t end = part == parts ? out : out * part / parts / kSizeStep * kSizeStep;
      tiles.push_back({.products = &products, .rows = rows, .first = first, .count = end - first});
      first = end;
    }
  }
}

}  // namespace

void outer_into(const std::vector<ExpertRows>& experts, const std::vector<OuterProducts>& products) {
  std::vector<OuterTile> tiles;
  for (const OuterProducts& one : products) {
    check(one);
    cut_outer(experts, one, tiles);
  }
  if (tiles.empty()) return;
  std::int64_t most_values = 0;
  for (const OuterTile& tile : tiles)
    most_values = std::max(most_values, WorkerTransposes::values(tile.rows.rows, tile.count));
  const WorkerTransposes turned(products[0].grad_ZO.values_XD.options(), most_values);
  run_tasks(static_cast<std::int64_t>(tiles.size()), [&](std::int64_t i, std::int64_t worker) {
    tiles[static_cast<std::size_t>(i)].compute(turned, worker);
  });
}

void outer_into_aten(const std::vector<ExpertRows>& experts, const std::vector<OuterProducts>& products) {
  for (const OuterProducts& one : products) {
    check(one);
    const at::Tensor grad_ZO = one.grad_ZO.tensor();
    const at::Tensor x_ZI = one.x_ZI.tensor();
    for (const ExpertRows& rows : experts)
      outer_product(rows.of(grad_ZO).t(), rows.of(x_ZI), one.grad_EOI.select(0, rows.expert));
  }
}

}  // namespace collegium::ops
