// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "collegium/base/fields.h"
#include "collegium/optim/master_weights.h"

namespace collegium::optim {

struct AdamWOptions {
  double learning_rate = 1e-3;
  double beta1 = 0.9;
  double beta2 = 0.95;
  double epsilon = 1e-8;
  double weight_decay = 0.1;
  bool decay_norms = false;
  double clip_norm = 1.0;
};
template <class Fields>
void describe(Fields& fields, AdamWOptions& o) {
  fields("learning_rate", o.learning_rate, "peak rate");
  fields("beta1", o.beta1, "decay of the first moment, in [0, 1)");
  fields("beta2", o.beta2, "decay of the second moment, in [0, 1)");
  fields("epsilon", o.epsilon, "added to the root of the second moment");
  fields("weight_decay", o.weight_decay, "decoupled weight decay of matrices");
  fields("decay_norms", o.decay_norms, "decay norm weights too");
  fields("clip_norm", o.clip_norm, "largest global gradient norm; 0 = no clipping");
}

/// Throws ConfigError naming the field (below `path`), its value and the rule.
void validate(const AdamWOptions& options, const std::string& path);

/// What     One step of AdamW for every slot, in one pass over master, gradient, moments and value; clears
///          the gradients.
/// Math     g' = scale g; m = b1 m + (1 - b1) g'; v = b2 v + (1 - b2) g'^2; w -= rate (m / (1 - b1^t) /
///          (sqrt(v / (1 - b2^t)) + eps) + decay w); value = round(w). An expert without tokens has
///          gradient zero: its moments decay and its weights still move and shrink. What a slot marks as
///          frozen stays as it is, decay included.
/// Order    Elementwise, so bit-identical for any number of threads.
/// Ref      [Loshchilov2019, Alg 2] arXiv 1711.05101
void adamw_step(const AdamWOptions& options, double rate, double gradient_scale, std::int64_t step,
                std::vector<Slot>& slots);

}  // namespace collegium::optim
