#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The whole training step beside transformers, interleaved in one session.

Work: 4 layers, hidden 512, 8 heads, vocabulary 8192, 8 x 512 tokens, AdamW, bf16 weights; a coarse shape (8 experts,
top 2, width 896) and a fine one (64 experts, top 8, width 128). transformers keeps bf16 weights and moments; ours keeps
fp32 masters and moments beside its bf16 weights. Each figure is the best step of all rounds, warm-up left out.
"""

import argparse
import json
import os
import pathlib
import subprocess
import tempfile
import time

os.environ.setdefault("OMP_PROC_BIND", "true")  # the peer's threads are bound too

import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

SHAPES = {"E=8 K=2 F=896": (8, 2, 896), "E=64 K=8 F=128": (64, 8, 128)}
SEQUENCES, LENGTH, VOCABULARY = 8, 512, 8192
RUN_FILE = """run_folder = "{folder}/run"
[data]
path = "{folder}/data"
sequence_length = {length}
[batch]
global_batch = {sequences}
micro_sequences = {sequences}
[train]
steps = {steps}
[model]
family = "mixtral"
hidden_size = 512
num_layers = 4
num_heads = 8
[model.moe]
num_experts = {experts}
top_k = {top_k}
ffn_size = {ffn}
[model.moe.balance]
load_balance = 0.01
[validation]
sequences = 1
"""


def peer_step_seconds(shape: tuple, implementation: str, steps: int) -> float:
    experts, top_k, ffn = shape
    config = transformers.MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        intermediate_size=ffn,
        num_local_experts=experts,
        num_experts_per_tok=top_k,
        output_router_logits=True,
    )
    config._experts_implementation = implementation
    model = transformers.MixtralForCausalLM(config).to(torch.bfloat16).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    ids = torch.randint(0, VOCABULARY, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(1))
    best = float("inf")
    for step in range(steps + 1):
        start = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step > 0:
            best = min(best, time.perf_counter() - start)
    return best


def our_step_seconds(binary: str, shape: tuple, steps: int) -> float:
    experts, top_k, ffn = shape
    with tempfile.TemporaryDirectory() as folder:
        ids = torch.randint(0, VOCABULARY, (200_000,), generator=torch.Generator().manual_seed(1))
        save_file({"input_ids": ids}, f"{folder}/ids.safetensors")
        prepare = ["prepare", "--out", f"{folder}/data", "--tokens", f"random={folder}/ids.safetensors"]
        subprocess.run([binary, *prepare, "--vocab-size", str(VOCABULARY)], check=True, capture_output=True)
        options = {"folder": folder, "length": LENGTH, "sequences": SEQUENCES, "steps": steps + 1}
        text = RUN_FILE.format(**options, experts=experts, top_k=top_k, ffn=ffn)
        pathlib.Path(folder, "run.toml").write_text(text)
        environment = {key: value for key, value in os.environ.items() if key != "OMP_PROC_BIND"}
        subprocess.run([binary, "train", f"{folder}/run.toml"], check=True, capture_output=True, env=environment)
        records = [json.loads(line) for line in pathlib.Path(folder, "run/metrics.jsonl").read_text().splitlines()]
        return min(record["seconds"] for record in records if record["kind"] == "step" and record["step"] > 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collegium", default="build/bin/collegium", help="the binary")
    parser.add_argument("--rounds", type=int, default=2, help="how often the systems take turns")
    parser.add_argument("--steps", type=int, default=3, help="measured steps a turn")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    tokens = SEQUENCES * LENGTH
    print(f"{'tokens/s':18}{'eager':>12}{'grouped_mm':>12}{'collegium':>12}{'ratio to the better':>22}")
    for name, shape in SHAPES.items():
        best = dict.fromkeys(("eager", "grouped_mm", "collegium"), float("inf"))
        for _ in range(arguments.rounds):
            for implementation in ("eager", "grouped_mm"):
                seconds = peer_step_seconds(shape, implementation, arguments.steps)
                best[implementation] = min(best[implementation], seconds)
            best["collegium"] = min(best["collegium"], our_step_seconds(arguments.collegium, shape, arguments.steps))
        ratio = min(best["eager"], best["grouped_mm"]) / best["collegium"]
        print(
            f"{name:18}" + "".join(f"{tokens / value:12.0f}" for value in best.values()) + f"{ratio:22.2f}", flush=True
        )


if __name__ == "__main__":
    main()
