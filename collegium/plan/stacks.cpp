// SPDX-License-Identifier: Apache-2.0
// Habits of the training stacks that published runs were measured with. Each entry states facts of the
// software; the one fitted figure, the efficiency of matrix products, is not here.
#include "collegium/base/text.h"
#include "collegium/plan/published.h"

namespace collegium::plan {

namespace {

// Megatron-LM before fused attention: scores kept, dropout on, gradients reduced in 16 bits before the
// optimizer runs.
Stack megatron_2021() {
  Stack s;
  s.flash_attention = false;
  s.causal_skip = false;
  s.dropout_mask_bytes = 1.0;
  s.reduce_bytes = 2.0;
  s.data_overlap = 0.0;
  // Sharded weights of that time: parameter by parameter, over one ring.
  s.one_ring_gathers = true;
  s.sharded_overlap = 0.5;
  return s;
}

Stack megatron_deepspeed(const std::string& precision) {
  Stack s = megatron_2021();
  s.split_pipeline_sends = false;
  s.balanced_stages = true;
  s.fused_accumulation = false;
  s.reduce_bytes = precision == "bf16" ? 4.0 : 2.0;
  // A 16-bit gradient, with bf16 also its fp32 sum.
  s.gradient_bytes = precision == "bf16" ? 6.0 : 2.0;
  // Reduction and gathering buckets and flat send buffers: one constant for the stack, from its published
  // sweep.
  s.bucket_bytes = 8e9;
  s.keeps_stage_edges = true;
  s.fragmentation = 0.06;
  // Its scripts make every launch wait for its kernel: Python and the framework's own work are never hidden.
  s.blocked_host_s = 2.0e-3;
  return s;
}

// Fully sharded training of 2023 and 2024: its fused attention was not written for Hopper.
Stack fully_sharded() {
  Stack s;
  s.reduce_bytes = 4.0;
  s.fused_elementwise = false;
  s.attention_share = 0.5;
  return s;
}

Stack megatron_core() {
  Stack s;
  s.data_overlap = 0.9;
  s.tensor_overlap = 0.5;
  return s;
}

}  // namespace

std::string source_name(const std::string& source) {
  const std::size_t container = source.find('[');
  const std::size_t end = source.find(']');
  std::string name = source.substr(0, source.find('@'));
  if (contains(source, "MICRO24") || contains(source, "vTrain")) return "VIA-Research/vTrain";
  if (contains(source, "Container]") && container != std::string::npos && end != std::string::npos)
    return name.append(" ").append(source.substr(container, end - container + 1));
  if (contains(source, "functional_tests")) return name.append(" golden runs");
  const std::size_t slash = source.rfind('/');
  if (slash != std::string::npos && source.find('@') != std::string::npos && slash > source.find('@')) {
    const std::string document = source.substr(slash + 1);
    name.append(" ").append(document.substr(0, document.find_first_of(" ;(")));
  }
  return name;
}

Stack stack_of(const std::string& source, const std::string& precision) {
  Stack s;
  if (contains(source, "bigscience")) {
    s = megatron_deepspeed(precision);
  } else if (contains(source, "vTrain") || contains(source, "5281919420") || contains(source, "50a4b5fa02") ||
             contains(source, "cli99") || contains(source, "calculon") || contains(source, "2e90a342f5") ||
             contains(source, "2205.05198")) {
    s = megatron_2021();
    s.never_fitted = contains(source, "calculon");
  } else if (contains(source, "llm-foundry")) {
    s = fully_sharded();
  } else if (contains(source, "torchtitan")) {
    s = fully_sharded();
    s.fused_elementwise = true;
    s.fragmentation = 0.06;
  } else if (contains(source, "Megatron")) {
    s = megatron_core();
    // Its performance recipes keep and reduce gradients in 16 bits.
    if (contains(source, "Bridge")) {
      s.gradient_bytes = s.reduce_bytes = 2.0;
      s.expert_overlap = 0.35;
      s.fused_sinks = false;
      s.batched_experts = false;
      s.arranges_stages = true;
    }
  }
  if (contains(source, "unfused attention")) {
    s.flash_attention = false;
    s.causal_skip = false;
  }
  if (contains(source, "golden") && contains(source, "non-gated")) s.dropout_mask_bytes = 1.0;
  s.name = source_name(source);
  s.family = s.name;
  if (contains(source, "bigscience")) s.family = "Megatron-DeepSpeed";
  // Releases of one half-year share kernels; between halves the same layout moved by up to 37 %.
  if (contains(source, "Bridge")) s.family = "Megatron-Bridge";
  for (const char* early : {"[25.09", "[25.11"}) {
    if (contains(source, early)) s.family = "Megatron-Bridge 25";
  }
  for (const char* late : {"[26.06", "[26.08", "[26.1"}) {
    if (contains(source, late)) s.family = "Megatron-Bridge from 26.06";
  }
  for (const char* document : {"5281919420", "50a4b5fa02", "cli99", "2e90a342f5"}) {
    if (contains(source, document)) s.family = "Megatron-LM 2021";
  }
  return s;
}

}  // namespace collegium::plan
