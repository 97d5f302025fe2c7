// SPDX-License-Identifier: Apache-2.0
#include "collegium/model/causal_attention.h"

#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mul.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <cmath>

#include "collegium/base/error.h"
#include "collegium/ops/expert_tasks.h"
#include "collegium/ops/product.h"
#include "collegium/ops/row_math.h"
#include "collegium/ops/transpose.h"

namespace collegium::model {

namespace {

// Scores of consecutive queries, the first of which sees `visible` keys, each next one more; rows lie `width`
// scores apart.
template <typename W>
struct ScoreRows {
  W* scores;
  std::int64_t rows;
  std::int64_t visible;
  std::int64_t width;
  W* log_sums;  // log of the sum of exponentials, per row
};

template <typename W>
COLLEGIUM_INLINE void softmax_rows(const ScoreRows<W>& o) {
  for (std::int64_t row = 0; row < o.rows; ++row) {
    W* __restrict__ scores = o.scores + row * o.width;
    const std::int64_t count = o.visible + row;
    const W largest = ops::row_math::lane_max(scores, count);
    for (std::int64_t i = 0; i < count; ++i) scores[i] = ops::row_math::exp_of_negative(scores[i] - largest);
    const W sum = ops::row_math::lane_sum<W>(count, [scores](std::int64_t i) { return scores[i]; });
    const W scale = W{1} / sum;
    for (std::int64_t i = 0; i < count; ++i) scores[i] *= scale;
    std::fill(scores + count, scores + o.width, W{0});
    o.log_sums[row] = largest + std::log(sum);
  }
}

// Scores become probabilities, and their gradients d P those of the scores: d S = P (d P - sum over keys of P
// d P).
template <typename W>
COLLEGIUM_INLINE void softmax_gradient_rows(const ScoreRows<W>& o, W* gradients, const W* sums) {
  for (std::int64_t row = 0; row < o.rows; ++row) {
    W* __restrict__ scores = o.scores + row * o.width;
    W* __restrict__ gradient = gradients + row * o.width;
    const std::int64_t count = o.visible + row;
    const W log_sum = o.log_sums[row];
    const W sum = sums[row];
    for (std::int64_t i = 0; i < count; ++i) {
      const W above = scores[i] - log_sum;  // at most a rounding above zero
      const W p = ops::row_math::exp_of_negative(above < W{0} ? above : W{0});
      scores[i] = p;
      gradient[i] = p * (gradient[i] - sum);
    }
    std::fill(scores + count, scores + o.width, W{0});
    std::fill(gradient + count, gradient + o.width, W{0});
  }
}

COLLEGIUM_CLONES void softmax(const ScoreRows<float>& o) { softmax_rows(o); }
COLLEGIUM_CLONES void softmax(const ScoreRows<double>& o) { softmax_rows(o); }
COLLEGIUM_CLONES void softmax_gradient(const ScoreRows<float>& o, float* gradients, const float* sums) {
  softmax_gradient_rows(o, gradients, sums);
}
COLLEGIUM_CLONES void softmax_gradient(const ScoreRows<double>& o, double* gradients, const double* sums) {
  softmax_gradient_rows(o, gradients, sums);
}

template <typename W>
ScoreRows<W> score_rows(const at::Tensor& scores_QC, std::int64_t first, const at::Tensor& log_sums_Q) {
  return {.scores = scores_QC.mutable_data_ptr<W>(),
          .rows = scores_QC.size(0),
          .visible = first + 1,
          .width = scores_QC.stride(0),
          .log_sums = log_sums_Q.mutable_data_ptr<W>()};
}

// What one worker computes a head with, in the wide dtype.
class Workspace {
 public:
  Workspace(std::int64_t length, std::int64_t head_dim, at::ScalarType dtype) {
    const std::int64_t queries = std::min(kAttentionQueries, length);
    for (at::Tensor* matrix : {&q_SA, &k_SA, &v_SA, &out_SA, &grad_q_SA})
      *matrix = at::empty({length, head_dim}, dtype);
    for (at::Tensor* matrix : {&grad_k_AS, &grad_v_AS}) *matrix = at::empty({head_dim, length}, dtype);
    scores_ = at::empty({queries * ops::rounded_rows(length)}, dtype);
    gradients_ = at::empty({queries * ops::rounded_rows(length)}, dtype);
  }

  at::Tensor scores(std::int64_t rows, std::int64_t keys) const { return part(scores_, rows, keys); }
  at::Tensor gradients(std::int64_t rows, std::int64_t keys) const { return part(gradients_, rows, keys); }

  at::Tensor q_SA, k_SA, v_SA, out_SA, grad_q_SA;
  // Transposed: the product whose second operand has long rows runs at 98 GFLOP/s of a core, the one whose
  // first operand is transposed at 73 to 93.
  at::Tensor grad_k_AS, grad_v_AS;

 private:
  // Rows lie apart by one of few numbers, for each of which block products have a kernel.
  static at::Tensor part(const at::Tensor& buffer, std::int64_t rows, std::int64_t keys) {
    const std::int64_t width = ops::rounded_rows(keys);
    return buffer.narrow(0, 0, rows * width).view({rows, width}).narrow(1, 0, keys);
  }

  at::Tensor scores_, gradients_;
};

std::vector<Workspace> make_workspaces(const at::Tensor& q_BHSA) {
  std::vector<Workspace> all;
  for (int i = 0; i < at::get_num_threads(); ++i)
    all.emplace_back(q_BHSA.size(2), q_BHSA.size(3), at::toOpMathType(q_BHSA.scalar_type()));
  return all;
}

at::Tensor head(const at::Tensor& all_BHSA, std::int64_t b, std::int64_t h) {
  return all_BHSA.select(0, b).select(0, h);
}

// Calls work(first query, queries, keys) for one block of queries after the other.
template <typename Work>
void for_each_block(std::int64_t length, const Work& work) {
  for (std::int64_t first = 0; first < length; first += kAttentionQueries) {
    const std::int64_t rows = std::min(kAttentionQueries, length - first);
    work(first, rows, first + rows);
  }
}

// q / sqrt(A): the scores need no scaling of their own.
void load_queries(const Workspace& w, const at::Tensor& q_SA) {
  w.q_SA.copy_(q_SA);
  w.q_SA.mul_(1.0 / std::sqrt(static_cast<double>(q_SA.size(1))));
}

void forward_head(const Workspace& w, const at::Tensor& log_sums_S) {
  for_each_block(w.q_SA.size(0), [&](std::int64_t first, std::int64_t rows, std::int64_t keys) {
    const at::Tensor scores = w.scores(rows, keys);
    ops::product_into(w.q_SA.narrow(0, first, rows), w.k_SA.narrow(0, 0, keys).t(), scores);
    const at::Tensor log_sums = log_sums_S.narrow(0, first, rows);
    if (scores.scalar_type() == at::kDouble) {
      softmax(score_rows<double>(scores, first, log_sums));
    } else {
      softmax(score_rows<float>(scores, first, log_sums));
    }
    ops::product_into(scores, w.v_SA.narrow(0, 0, keys), w.out_SA.narrow(0, first, rows));
  });
}

// `out_SA` holds dLoss/d(output); `sums_S` its dot product with the output, per query. Adds to the gradients
// of keys and values.
void backward_head(const Workspace& w, const at::Tensor& sums_S, const at::Tensor& log_sums_S) {
  for_each_block(w.q_SA.size(0), [&](std::int64_t first, std::int64_t rows, std::int64_t keys) {
    const at::Tensor q = w.q_SA.narrow(0, first, rows);
    const at::Tensor grad_out = w.out_SA.narrow(0, first, rows);
    const at::Tensor k = w.k_SA.narrow(0, 0, keys);
    const at::Tensor scores = w.scores(rows, keys);
    const at::Tensor gradients = w.gradients(rows, keys);
    ops::product_into(q, k.t(), scores);
    ops::product_into(grad_out, w.v_SA.narrow(0, 0, keys).t(), gradients);
    const at::Tensor sums = sums_S.narrow(0, first, rows);
    const at::Tensor log_sums = log_sums_S.narrow(0, first, rows);
    if (scores.scalar_type() == at::kDouble) {
      softmax_gradient(score_rows<double>(scores, first, log_sums), gradients.mutable_data_ptr<double>(),
                       sums.const_data_ptr<double>());
    } else {
      softmax_gradient(score_rows<float>(scores, first, log_sums), gradients.mutable_data_ptr<float>(),
                       sums.const_data_ptr<float>());
    }
    ops::product_into(gradients, k, w.grad_q_SA.narrow(0, first, rows));
    w.grad_k_AS.narrow(1, 0, keys).addmm_(q.t(), gradients);
    w.grad_v_AS.narrow(1, 0, keys).addmm_(grad_out.t(), scores);
  });
  w.grad_q_SA.mul_(1.0 / std::sqrt(static_cast<double>(w.q_SA.size(1))));
}

// ATen's copy of a transpose goes value by value and takes four to five times as long.
void store_turned(const at::Tensor& from_AS, const at::Tensor& through_SA, const at::Tensor& to_SA) {
  if (from_AS.scalar_type() == to_SA.scalar_type()) return ops::transpose_into(from_AS, to_SA);
  ops::transpose_into(from_AS, through_SA);
  to_SA.copy_(through_SA);
}

// [B, H, S, A] over memory of [B, S, H, A], as the projections around the attention have it.
at::Tensor empty_heads(const at::Tensor& like_BHSA) {
  return at::empty({like_BHSA.size(0), like_BHSA.size(2), like_BHSA.size(1), like_BHSA.size(3)},
                   like_BHSA.options())
      .transpose(1, 2);
}

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

class CausalAttention final : public torch::autograd::Function<CausalAttention> {
 public:
  static Variable forward(AutogradContext* context, const Variable& q, const Variable& k, const Variable& v) {
    const std::int64_t heads = q.size(1);
    const std::int64_t times = heads / k.size(1);
    at::Tensor out_BHSA = empty_heads(q);
    const auto wide = at::toOpMathType(q.scalar_type());
    const at::Tensor log_sums_BHS = at::empty({q.size(0), heads, q.size(2)}, q.options().dtype(wide));
    const auto workspaces = make_workspaces(q);
    ops::run_tasks(q.size(0) * heads, [&](std::int64_t task, std::int64_t worker) {
      const std::int64_t b = task / heads;
      const std::int64_t h = task % heads;
      const Workspace& w = workspaces[static_cast<std::size_t>(worker)];
      load_queries(w, head(q, b, h));
      w.k_SA.copy_(head(k, b, h / times));
      w.v_SA.copy_(head(v, b, h / times));
      forward_head(w, log_sums_BHS.select(0, b).select(0, h));
      head(out_BHSA, b, h).copy_(w.out_SA);
    });
    context->save_for_backward({q, k, v, out_BHSA, log_sums_BHS});
    return out_BHSA;
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const variable_list saved = context->get_saved_variables();
    const at::Tensor& q = saved[0];
    const at::Tensor& k = saved[1];
    const at::Tensor& v = saved[2];
    const at::Tensor& out = saved[3];
    const at::Tensor& log_sums_BHS = saved[4];
    at::Tensor grad_q = empty_heads(q);
    at::Tensor grad_k = empty_heads(k);
    at::Tensor grad_v = empty_heads(v);
    const std::int64_t kv_heads = k.size(1);
    const std::int64_t times = q.size(1) / kv_heads;
    const auto workspaces = make_workspaces(q);
    // A task has all queries of a key/value head, so that its gradients are summed in one order.
    ops::run_tasks(q.size(0) * kv_heads, [&](std::int64_t task, std::int64_t worker) {
      const std::int64_t b = task / kv_heads;
      const std::int64_t j = task % kv_heads;
      const Workspace& w = workspaces[static_cast<std::size_t>(worker)];
      w.k_SA.copy_(head(k, b, j));
      w.v_SA.copy_(head(v, b, j));
      w.grad_k_AS.zero_();
      w.grad_v_AS.zero_();
      for (std::int64_t h = j * times; h < (j + 1) * times; ++h) {
        load_queries(w, head(q, b, h));
        w.out_SA.copy_(head(grads[0], b, h));
        at::Tensor products_SA = w.grad_q_SA;  // which is written later
        at::mul_out(products_SA, w.out_SA, head(out, b, h));
        backward_head(w, products_SA.sum(-1), head(log_sums_BHS, b, h));
        head(grad_q, b, h).copy_(w.grad_q_SA);
      }
      store_turned(w.grad_k_AS, w.k_SA, head(grad_k, b, j));
      store_turned(w.grad_v_AS, w.v_SA, head(grad_v, b, j));
    });
    return {grad_q, grad_k, grad_v};
  }
};

}  // namespace

at::Tensor causal_attention(const at::Tensor& q_BHSA, const at::Tensor& k_BJSA, const at::Tensor& v_BJSA) {
  COLLEGIUM_CHECK(q_BHSA.size(1) % k_BJSA.size(1) == 0 && k_BJSA.sizes() == v_BJSA.sizes() &&
                      q_BHSA.size(2) == k_BJSA.size(2),
                  "{} heads over {} key/value heads, {} queries, {} keys", q_BHSA.size(1), k_BJSA.size(1),
                  q_BHSA.size(2), k_BJSA.size(2));
  return CausalAttention::apply(q_BHSA, k_BJSA, v_BJSA);
}

}  // namespace collegium::model
