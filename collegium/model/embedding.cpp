// SPDX-License-Identifier: Apache-2.0
#include "collegium/model/embedding.h"

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/ops/embedding.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <numeric>
#include <vector>

namespace collegium::model {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr std::int64_t kLookupRowsPerTask = 32;

// Tokens ordered by (id, position), and where the run of each id begins.
struct TokensById {
  std::vector<std::int64_t> tokens;
  std::vector<std::int64_t> begins;
};

TokensById sort_by_id(const std::int64_t* ids, std::int64_t count, std::int64_t padding_id) {
  TokensById sorted;
  for (std::int64_t t = 0; t < count; ++t) {
    if (ids[t] != padding_id) sorted.tokens.push_back(t);
  }
  std::stable_sort(sorted.tokens.begin(), sorted.tokens.end(),
                   [ids](std::int64_t a, std::int64_t b) { return ids[a] < ids[b]; });
  std::int64_t previous = -1;
  for (std::size_t i = 0; i < sorted.tokens.size(); ++i) {
    const std::int64_t id = ids[sorted.tokens[i]];
    if (id != previous) sorted.begins.push_back(static_cast<std::int64_t>(i));
    previous = id;
  }
  sorted.begins.push_back(static_cast<std::int64_t>(sorted.tokens.size()));
  return sorted;
}

class EmbeddingFunction final : public torch::autograd::Function<EmbeddingFunction> {
 public:
  static at::Tensor forward(AutogradContext* context, const at::Tensor& weight_VD, const at::Tensor& ids_BS,
                            std::int64_t padding_id) {
    context->save_for_backward({ids_BS});
    context->saved_data["rows"] = weight_VD.size(0);
    context->saved_data["padding_id"] = padding_id;
    return at::embedding(weight_VD, ids_BS);
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const at::Tensor ids = context->get_saved_variables()[0].contiguous();
    const at::Tensor grad = grads[0].contiguous();
    const std::int64_t width = grad.size(-1);
    const auto* id = ids.const_data_ptr<std::int64_t>();
    const TokensById sorted = sort_by_id(id, ids.numel(), context->saved_data["padding_id"].toInt());
    at::Tensor grad_VD = at::zeros({context->saved_data["rows"].toInt(), width}, grad.options());
    AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, grad.scalar_type(), "embedding_backward", [&] {
      const auto* source = grad.const_data_ptr<scalar_t>();
      auto* target = grad_VD.mutable_data_ptr<scalar_t>();
      const auto num_rows = static_cast<std::int64_t>(sorted.begins.size()) - 1;
      at::parallel_for(0, num_rows, kLookupRowsPerTask, [&](std::int64_t begin, std::int64_t end) {
        std::vector<at::opmath_type<scalar_t>> sum(static_cast<std::size_t>(width));
        for (auto row = static_cast<std::size_t>(begin); row < static_cast<std::size_t>(end); ++row) {
          std::fill(sum.begin(), sum.end(), 0);
          const auto first = static_cast<std::size_t>(sorted.begins[row]);
          const auto last = static_cast<std::size_t>(sorted.begins[row + 1]);
          for (std::size_t i = first; i < last; ++i) {
            const scalar_t* values = source + sorted.tokens[i] * width;
            for (std::size_t d = 0; d < sum.size(); ++d) sum[d] += values[d];
          }
          scalar_t* out = target + id[sorted.tokens[first]] * width;
          for (std::size_t d = 0; d < sum.size(); ++d) out[d] = static_cast<scalar_t>(sum[d]);
        }
      });
    });
    return {grad_VD, at::Tensor(), at::Tensor()};
  }
};

}  // namespace

at::Tensor embed(const at::Tensor& weight_VD, const at::Tensor& ids_BS, std::int64_t padding_id) {
  if (!weight_VD.is_cpu()) return at::embedding(weight_VD, ids_BS, padding_id);
  return EmbeddingFunction::apply(weight_VD, ids_BS, padding_id);
}

}  // namespace collegium::model
