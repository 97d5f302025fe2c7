// SPDX-License-Identifier: Apache-2.0
#include "collegium/ops/product.h"

#include <ATen/cpu/Utils.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <atomic>

#include "collegium/ops/expert_tasks.h"

namespace collegium::ops {

namespace {

bool found_bf16_products() {
  const auto capabilities = at::cpu::get_cpu_capabilities();
  const auto has = [&](const char* name) {
    const auto found = capabilities.find(name);
    return found != capabilities.end() && found->second.isBool() && found->second.toBool();
  };
  const auto architecture = capabilities.find("architecture");
  const bool x86 = architecture != capabilities.end() && architecture->second.toStringRef() == "x86_64";
  return !x86 || has("avx512_bf16") || has("amx_bf16");
}

std::atomic<bool>& bf16_products() {
  static std::atomic<bool> has{found_bf16_products()};
  return has;
}

}  // namespace

bool has_bf16_products() { return bf16_products(); }

void assume_bf16_products(std::optional<bool> has) { bf16_products() = has ? *has : found_bf16_products(); }

at::ScalarType product_dtype(at::ScalarType dtype) {
  return dtype == at::kBFloat16 && !has_bf16_products() ? at::kFloat : dtype;
}

void product_into(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out) {
  if (out.is_cpu() && product_dtype(out.scalar_type()) != out.scalar_type()) {
    widened_product_into(a, b, out);
  } else {
    at::Tensor target = out;
    at::mm_out(target, a, b);
  }
}

void widened_product_into(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out) {
  out.copy_(at::mm(a.to(at::kFloat), b.to(at::kFloat)));
}

at::Tensor product(const at::Tensor& a, const at::Tensor& b) {
  const bool widens = a.is_cpu() && product_dtype(a.scalar_type()) != a.scalar_type();
  return widens ? widened_product(a, b) : at::mm(a, b);
}

at::Tensor widened_product(const at::Tensor& a, const at::Tensor& b) {
  // An eighth of the rows at a time gives several cores work; more than 512 would leave the core's cache.
  constexpr std::int64_t kParts = 8;
  constexpr std::int64_t kLeastRows = 128;
  const std::int64_t num_rows = a.size(0);
  const std::int64_t most_rows = std::clamp(num_rows / kParts, kLeastRows, kMostGemmRows);
  const at::Tensor wide_b = b.to(at::kFloat);
  at::Tensor out = at::empty({num_rows, b.size(1)}, a.options());
  run_tasks((num_rows + most_rows - 1) / most_rows, [&](std::int64_t i, std::int64_t) {
    const std::int64_t first = i * most_rows;
    const std::int64_t rows = std::min(most_rows, num_rows - first);
    widened_product_into(a.narrow(0, first, rows), wide_b, out.narrow(0, first, rows));
  });
  return out;
}

}  // namespace collegium::ops
