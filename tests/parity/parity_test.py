#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Logits, loss, auxiliary loss and every gradient of `collegium eval` against transformers.

Random tiny models of the three families, with odd sizes on purpose. float64 must agree to 1e-9 (norm-wise relative);
transformers computes norms, rotary tables and the router's softmax in float32 even then, which the test lifts.
float32 must agree within epsilon times the length of the longest reductions on the path.
"""

import pathlib
import tempfile

import torch
import transformers
from compare import check
from safetensors.torch import save_file

COMMON = {
    "vocab_size": 61,
    "num_hidden_layers": 2,
    "initializer_range": 0.3,
    "max_position_embeddings": 64,
}
CASES = {
    "mixtral": (
        "Mixtral",
        {
            "hidden_size": 24,
            "intermediate_size": 20,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
        },
    ),
    "mixtral_head_dim_tied_aux": (
        "Mixtral",
        {
            "hidden_size": 20,
            "intermediate_size": 12,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "head_dim": 10,
            "num_local_experts": 4,
            "num_experts_per_tok": 3,
            "tie_word_embeddings": True,
            "output_router_logits": True,
            "router_aux_loss_coef": 0.1,
        },
    ),
    "mixtral_window": (
        "Mixtral",
        {
            "hidden_size": 16,
            "intermediate_size": 8,
            "num_attention_heads": 2,
            "sliding_window": 5,
            "num_key_value_heads": 2,
            "num_local_experts": 3,
            "num_experts_per_tok": 2,
        },
    ),
    "olmoe": (
        "Olmoe",
        {
            "hidden_size": 24,
            "intermediate_size": 10,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "eos_token_id": None,
        },
    ),
    "olmoe_norm_clip_aux": (
        "Olmoe",
        {
            "hidden_size": 16,
            "intermediate_size": 14,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "num_experts": 7,
            "num_experts_per_tok": 4,
            "norm_topk_prob": True,
            "clip_qkv": 0.5,
            "output_router_logits": True,
            "eos_token_id": None,
        },
    ),
    "qwen3_dense_between_aux": (
        "Qwen3Moe",
        {
            "hidden_size": 24,
            "intermediate_size": 18,
            "moe_intermediate_size": 10,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
            "num_hidden_layers": 4,
            "mlp_only_layers": [0],
            "decoder_sparse_step": 2,
            "output_router_logits": True,
        },
    ),
    "qwen3_no_norm_one_of_one": (
        "Qwen3Moe",
        {
            "hidden_size": 14,
            "intermediate_size": 18,
            "moe_intermediate_size": 6,
            "num_attention_heads": 5,
            "num_key_value_heads": 5,
            "head_dim": 6,
            "num_experts": 3,
            "num_experts_per_tok": 3,
            "norm_topk_prob": False,
        },
    ),
}


def main() -> None:
    transformers.logging.set_verbosity_error()
    torch.manual_seed(1)
    checks = 0
    for name, (family, options) in CASES.items():
        with tempfile.TemporaryDirectory() as temporary:
            folder = pathlib.Path(temporary)
            config = getattr(transformers, family + "Config")(**{**COMMON, **options})
            model = getattr(transformers, family + "ForCausalLM")(config).double()
            for key, parameter in model.named_parameters():
                if "norm" in key:
                    parameter.data += 0.2 * torch.randn_like(parameter)
            model.save_pretrained(folder / "model", max_shard_size="20KB")
            save_file(
                {"input_ids": torch.randint(0, config.vocab_size, (3, 11))},
                folder / "ids.safetensors",
            )
            worst = {dtype: check(name, folder, dtype) for dtype in ("float64", "float32")}
            checks += 2
            print(
                f"{name:28} float64 {worst['float64']:.2e}  float32 {worst['float32']:.2e}",
                flush=True,
            )
    print(f"{checks} passed, 0 failed")


if __name__ == "__main__":
    main()
