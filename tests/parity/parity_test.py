#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Logits, loss, auxiliary loss and every gradient of `collegium eval` against transformers.

Random tiny models of the three families, with odd sizes on purpose. float64 must agree to 1e-9 (norm-wise relative);
transformers computes norms, rotary tables and the router's softmax in float32 even then, which the test lifts.
float32 must agree within epsilon times the length of the longest reductions on the path.
"""

import contextlib
import json
import pathlib
import subprocess
import sys
import tempfile

import torch
import transformers
from safetensors.torch import load_file, save_file

FLOAT64_BOUND = 1e-9
COLLEGIUM = sys.argv[1] if len(sys.argv) > 1 else "build/bin/collegium"

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


@contextlib.contextmanager
def lifted_to_float64():
    """Inside, `torch.float32`, `torch.float` and `.float()` mean float64."""
    saved = torch.float32, torch.float, torch.Tensor.float, torch.get_default_dtype()
    torch.float32 = torch.float = torch.float64
    torch.Tensor.float = torch.Tensor.double
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.float32, torch.float, torch.Tensor.float = saved[:3]
        torch.set_default_dtype(saved[3])


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    scale = b.double().norm().item()
    return (a.double() - b.double()).norm().item() / (scale if scale > 1e-12 else 1.0)


def collegium_eval(folder: pathlib.Path, dtype: str) -> tuple[dict, torch.Tensor, dict]:
    command = [
        COLLEGIUM,
        "eval",
        "--model",
        str(folder / "model"),
        "--input",
        str(folder / "ids.safetensors"),
    ]
    command += [
        "--dtype",
        dtype,
        "--json",
        "--logits",
        str(folder / "logits"),
        "--grads",
        str(folder / "grads"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise AssertionError(f"eval failed: {done.stderr}")
    return (
        json.loads(done.stdout),
        load_file(folder / "logits")["logits"],
        load_file(folder / "grads"),
    )


def disk_gradients(model, folder: pathlib.Path) -> dict[str, torch.Tensor]:
    """transformers' gradients under on-disk names: saved as if they were weights."""
    for parameter in model.parameters():
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
    model.save_pretrained(folder / "reference_grads")
    gradients = {}
    for shard in sorted((folder / "reference_grads").glob("*.safetensors")):
        gradients.update(load_file(shard))
    return gradients


def reference(folder: pathlib.Path, name: str, dtype: torch.dtype, ids: torch.Tensor):
    model_class = getattr(transformers, CASES[name][0] + "ForCausalLM")
    model = model_class.from_pretrained(
        folder / "model",
        dtype=dtype,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    model.train()
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    aux = getattr(out, "aux_loss", None)
    return (
        out.logits.detach().clone(),
        out.loss.item(),
        0.0 if aux is None else aux.item(),
        model,
    )


def check(name: str, folder: pathlib.Path, dtype_name: str) -> float:
    dtype = getattr(torch, dtype_name)
    context = lifted_to_float64() if dtype_name == "float64" else contextlib.nullcontext()
    ids = load_file(folder / "ids.safetensors")["input_ids"]
    with context:
        logits, loss, aux, model = reference(folder, name, dtype, ids)
        gradients = disk_gradients(model, folder)
    ours, our_logits, our_gradients = collegium_eval(folder, dtype_name)
    # float32: products of at most `longest` terms through `depth` chained operations.
    config = model.config
    longest = max(config.hidden_size, config.vocab_size, ids.numel())
    depth = 8 * config.num_hidden_layers
    bound = FLOAT64_BOUND if dtype_name == "float64" else torch.finfo(dtype).eps * longest * depth
    worst = relative(our_logits, logits)
    worst = max(worst, abs(ours["total_loss"] - loss) / abs(loss))
    if config.output_router_logits:
        worst = max(worst, abs(ours["aux_loss"] - aux) / max(abs(aux), 1e-12))
    assert set(gradients) == set(our_gradients), set(gradients) ^ set(our_gradients)
    for key, gradient in gradients.items():
        difference = relative(our_gradients[key], gradient)
        assert difference <= bound, f"{name} {dtype_name}: gradient of {key}: {difference:.3e} > {bound:.3e}"
        worst = max(worst, difference)
    assert worst <= bound, f"{name} {dtype_name}: {worst:.3e} > {bound:.3e} (logits, loss or aux loss)"
    return worst


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
