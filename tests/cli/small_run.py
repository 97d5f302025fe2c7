# SPDX-License-Identifier: Apache-2.0
"""A corpus of counting tokens and a run file with everything switched on, for tests of the command line."""

import pathlib
import subprocess

import torch
from safetensors.torch import save_file

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
qk_norm = "per_head"
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
    run_file.write_text(RUN_FILE.format(folder=folder, steps=steps, family=family))
    return run_file
