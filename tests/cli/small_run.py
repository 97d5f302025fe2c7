# SPDX-License-Identifier: Apache-2.0
"""A corpus of counting tokens and a run file with everything switched on, for tests of the command line."""

import json
import pathlib
import subprocess

import torch
from safetensors.torch import load_file, save_file

# What each family does to queries and keys.
FAMILIES = {"mixtral": "none", "olmoe": "projection", "qwen3_moe": "per_head"}

RUN_FILE = """run_folder = "{folder}/run"
[data]
path = "{folder}/data"
sequence_length = 16
[batch]
global_batch = 5
micro_sequences = 2
[train]
steps = {steps}
dtype = "bfloat16"
seed = 3
[model]
family = "{family}"
qk_norm = "{qk_norm}"
hidden_size = 16
num_layers = 2
num_heads = 2
num_kv_heads = 1
max_positions = 64
[model.moe]
num_experts = 4
top_k = 2
ffn_size = 8
[model.moe.router]
noise = "jitter_router"
[model.moe.capacity]
drop_policy = "random"
factor = "1.0"
min_capacity = 1
[model.moe.balance]
load_balance = 0.05
z_loss = 0.01
[optimizer]
learning_rate = 0.01
[checkpoint]
every_steps = 3
[validation]
every_steps = 4
sequences = 4
"""


def collegium(binary: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([binary, *arguments], capture_output=True, text=True, check=False)


def prepare(binary: str, folder: pathlib.Path, steps: int, family: str = "qwen3_moe") -> pathlib.Path:
    """Writes data and run file; returns the run file."""
    up = torch.arange(4000) % 23
    save_file({"input_ids": up}, folder / "up.safetensors")
    save_file({"input_ids": up.flip(0).clone()}, folder / "down.safetensors")
    arguments = ["--tokens", f"up={folder}/up.safetensors", "--tokens", f"down={folder}/down.safetensors"]
    done = collegium(binary, "prepare", "--out", f"{folder}/data", *arguments, "--vocab-size", "23")
    assert done.returncode == 0, done.stderr
    run_file = folder / "run.toml"
    run_file.write_text(RUN_FILE.format(folder=folder, steps=steps, family=family, qk_norm=FAMILIES[family]))
    return run_file


def checkpoint_of(done: subprocess.CompletedProcess) -> pathlib.Path:
    """Of a finished `train --json`."""
    assert done.returncode == 0, done.stderr
    return pathlib.Path(json.loads(done.stdout)["checkpoint"])


def eval_beside_transformers(binary: str, model_folder: pathlib.Path, ids: pathlib.Path) -> float:
    """The loss of `eval`, which must be that of transformers' model from the same folder."""
    import transformers

    done = collegium(binary, "eval", "--model", str(model_folder), "--input", str(ids), "--json")
    assert done.returncode == 0, done.stderr
    loss = json.loads(done.stdout)["loss"]
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    tokens = load_file(ids)["input_ids"]
    with torch.no_grad():
        reference = model(input_ids=tokens, labels=tokens).loss.item()
    bound = torch.finfo(torch.float32).eps * 64 * 16  # epsilon, width of the sums, chained operations
    assert abs(loss - reference) <= bound * abs(reference), (loss, reference)
    return loss
