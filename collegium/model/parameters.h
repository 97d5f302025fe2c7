// SPDX-License-Identifier: Apache-2.0
#pragma once

// The parameters of a model, by name. In memory an MoE layer's experts are three-dimensional tensors; on disk
// every expert has tensors of its own under its family's names, which are views of the former.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <vector>

#include "collegium/model/config.h"

namespace collegium::model {

enum class ParameterKind { kDense, kExpert, kRouter, kNorm, kEmbedding, kBuffer };

/// Which experts of every layer a rank holds.
struct ExpertRange {
  std::int64_t first = 0;
  std::int64_t count = -1;  ///< -1 = all from `first` on

  std::int64_t end(std::int64_t num_experts) const { return count < 0 ? num_experts : first + count; }
};

/// One tensor in memory. Names: "embed_tokens", "layers.3.attention.q", "layers.3.moe.gate_up",
/// "layers.3.moe.router", ...
struct Parameter {
  std::string name;
  ParameterKind kind = ParameterKind::kDense;
  std::vector<std::int64_t> shape;  ///< kExpert: dim 0 are the experts held here
  std::int64_t first_expert = 0;    ///< kExpert: global id of the first of them
  at::Tensor value;  ///< compute dtype (buffers: the router's dtype); an autograd leaf while it is trained
  bool trainable = true;   ///< false: frozen, or a buffer
  at::Tensor frozen = {};  ///< bool of the value's shape: what of it stays as it is; undefined = nothing
};

/// A piece of a parameter under its on-disk name: expert e's gate matrix is rows 0..F-1 of gate_up[e].
struct DiskTensor {
  std::string name;
  std::size_t parameter = 0;        ///< index into the list of parameters
  std::vector<std::int64_t> shape;  ///< on disk
  std::int64_t expert = -1;         ///< >= 0: a slice of one expert, counted from the first held here
  std::int64_t first_row = 0;       ///< of the (expert's) matrix
  std::int64_t num_rows = -1;       ///< -1: all
};

/// What     Every parameter of the model in a fixed order, without storage; of the experts those in `held`.
std::vector<Parameter> list_parameters(const ModelConfig& config, const ExpertRange& held = {});
/// What     Values of one parameter.
/// Throws   ConfigError naming it when they are more than any machine holds, so that sums over a model's
///          parameters, in bytes of their states, fit into 64 bits.
std::int64_t num_values(const Parameter& parameter);
/// What     Every on-disk tensor of the model, in the family's naming.
std::vector<DiskTensor> list_disk_tensors(const ModelConfig& config,
                                          const std::vector<Parameter>& parameters);
/// What     The view of `source` (a parameter's value, gradient or moment, of the parameter's shape) that a
///          disk tensor names.
at::Tensor disk_view(const DiskTensor& disk, const at::Tensor& source);

/// What     Allocates and fills every parameter from (seed, name, global expert id): the same on any
///          layout. Normal with standard deviation initializer_range, norms 1, buffers 0, and so a noisy
///          router's two matrices.
/// Dtype    drawn in float64, rounded to fp32 (the master) and from there to `dtype`.
void initialize_parameters(const ModelConfig& config, std::uint64_t seed, at::ScalarType dtype,
                           std::vector<Parameter>& parameters);

}  // namespace collegium::model
