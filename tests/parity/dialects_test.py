#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The ways in which the same model may lie on disk, and random configurations, against transformers.

The hub's dialect of config.json, keys left to the class defaults, experts under fused names, float16 weights; then
configurations drawn at random from what the three families allow.
"""

import json
import pathlib
import random
import shutil
import tempfile

import torch
import transformers
from compare import check
from safetensors.torch import load_file, save_file

SIZES = {"vocab_size": 53, "hidden_size": 16, "num_hidden_layers": 2, "initializer_range": 0.3}
FAMILIES = {
    "Mixtral": {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 12, "num_local_experts": 4},
    "Olmoe": {"num_attention_heads": 4, "intermediate_size": 12, "num_experts": 5, "num_experts_per_tok": 2},
    "Qwen3Moe": {
        "num_attention_heads": 4,
        "head_dim": 6,
        "moe_intermediate_size": 10,
        "num_experts": 6,
        "num_experts_per_tok": 3,
    },
}
NUM_RANDOM = 8  # per family


def make_model(family: str, options: dict):
    model = getattr(transformers, family + "ForCausalLM")(getattr(transformers, family + "Config")(**options)).double()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def write_ids(folder: pathlib.Path, vocab_size: int, batch: int, length: int) -> None:
    save_file({"input_ids": torch.randint(0, vocab_size, (batch, length))}, folder / "ids.safetensors")


def edit_config(folder: pathlib.Path, change) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def to_hub_dialect(config: dict) -> None:
    """As transformers 4 wrote it and the hub holds it."""
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope["rope_theta"]
    config["rope_scaling"] = None
    config["torch_dtype"] = config.pop("dtype", "float32")
    config["transformers_version"] = "4.45.0"
    if config["model_type"] != "mixtral" and "num_local_experts" in config:
        config["num_experts"] = config.pop("num_local_experts")


def without_defaults(config: dict) -> None:
    """Only what says the model's sizes: everything else is the class's default."""
    sizes = {"model_type", "architectures", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"}
    sizes |= {"num_key_value_heads", "head_dim", "intermediate_size", "moe_intermediate_size", "num_experts"}
    sizes |= {"num_local_experts", "num_experts_per_tok"}
    for key in list(config):
        if key not in sizes or config[key] is None:
            del config[key]


def check_dialects(family: str, folder: pathlib.Path) -> int:
    model = make_model(
        family, {**SIZES, **FAMILIES[family], "rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}
    )
    plain = folder / "plain"
    model.save_pretrained(plain)
    write_ids(folder, SIZES["vocab_size"], 2, 9)

    def against(name: str, theirs: pathlib.Path | None = None) -> None:
        worst = check(f"{family} {name}", folder, "float64", theirs)
        print(f"{family:9} {name:18} float64 {worst:.2e}", flush=True)
        shutil.rmtree(folder / "model")

    shutil.copytree(plain, folder / "model")
    edit_config(folder / "model", to_hub_dialect)
    against("hub dialect")

    shutil.copytree(plain, folder / "model")
    edit_config(folder / "model", without_defaults)
    against("class defaults")

    shutil.copytree(plain, folder / "model")
    (folder / "model/model.safetensors").unlink()
    fused = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    assert any(name.endswith("experts.gate_up_proj") for name in fused), "transformers fuses experts in memory"
    if model.config.tie_word_embeddings:
        fused.pop("lm_head.weight")
    save_file(fused, folder / "model/model.safetensors", {"format": "pt"})
    against("fused names", theirs=plain)

    model.half().save_pretrained(folder / "model")
    dtypes = {tensor.dtype for tensor in load_file(folder / "model/model.safetensors").values()}
    assert dtypes == {torch.float16}, dtypes
    against("float16 weights")
    return 4


def draw(family: str, dice: random.Random) -> dict:
    kv_heads = dice.choice([1, 2, 3])
    heads = kv_heads * dice.choice([1, 2, 3])
    head_dim = dice.choice([2, 4, 6, 10])
    experts = dice.randint(1, 9)
    options = {
        "vocab_size": dice.randint(5, 90),
        "hidden_size": heads * head_dim if family == "Olmoe" else dice.randint(3, 30),
        "num_hidden_layers": dice.randint(1, 3),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "rms_norm_eps": dice.choice([1e-6, 1e-5, 1e-2]),
        "rope_parameters": {"rope_type": "default", "rope_theta": dice.choice([10.0, 1e4, 1e6])},
        "tie_word_embeddings": dice.random() < 0.3,
        "num_experts_per_tok": dice.randint(1, experts),
        "output_router_logits": dice.random() < 0.5,
        "router_aux_loss_coef": dice.choice([0.0, 0.02, 1.0]),
        "pad_token_id": dice.choice([None, 0, 3]),
        "bos_token_id": None,
        "eos_token_id": None,
    }
    options["num_local_experts" if family == "Mixtral" else "num_experts"] = experts
    width = dice.randint(1, 20)
    options["moe_intermediate_size" if family == "Qwen3Moe" else "intermediate_size"] = width
    if family != "Olmoe":
        options["head_dim"] = head_dim
    if family != "Mixtral":
        options["norm_topk_prob"] = dice.random() < 0.5
    if family == "Mixtral":
        options["sliding_window"] = dice.choice([None, 1, 4])
    if family == "Olmoe":
        options["clip_qkv"] = dice.choice([None, 0.3])
    if family == "Qwen3Moe":
        options["intermediate_size"] = dice.randint(1, 20)
        options["decoder_sparse_step"] = dice.choice([1, 1, 2])
        options["mlp_only_layers"] = dice.choice([[], [0], [1]])
        layers = range(options["decoder_sparse_step"] - 1, options["num_hidden_layers"], options["decoder_sparse_step"])
        if not set(layers) - set(options["mlp_only_layers"]):
            options["output_router_logits"] = False  # transformers has no auxiliary loss of no layer
        window = dice.choice([None, 3])
        options.update({"use_sliding_window": window is not None or dice.random() < 0.5, "sliding_window": window})
    return options


def main() -> None:
    transformers.logging.set_verbosity_error()
    torch.manual_seed(3)
    dice = random.Random(11)
    checks = 0
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as temporary:
            checks += check_dialects(family, pathlib.Path(temporary))
        for number in range(NUM_RANDOM):
            with tempfile.TemporaryDirectory() as temporary:
                folder = pathlib.Path(temporary)
                options = draw(family, dice)
                make_model(family, options).save_pretrained(folder / "model", max_shard_size="10KB")
                write_ids(folder, options["vocab_size"], dice.randint(1, 3), dice.randint(2, 14))
                try:
                    worst = check(f"{family} random {number}", folder, dice.choice(["float64", "float64", "float32"]))
                except AssertionError as error:
                    raise AssertionError(f"{options}: {error}") from error
                print(f"{family:9} random {number:11} {worst:.2e}", flush=True)
                checks += 1
    print(f"{checks} passed, 0 failed")


if __name__ == "__main__":
    main()
