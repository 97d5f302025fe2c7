#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Models of every family that were trained here load in transformers with the same loss, and so do fine-tuned ones;
both generate the same text."""

import json
import pathlib
import sys
import tempfile

import torch
import transformers
from safetensors.torch import save_file
from small_run import FAMILIES, checkpoint_of, collegium, eval_beside_transformers, prepare

BINARY = sys.argv[1]

TUNE_FILE = """run_folder = "{folder}/tuned"
[data]
path = "{folder}/data"
sequence_length = 16
[batch]
global_batch = 4
micro_sequences = 2
[train]
steps = 3
[model]
init = "{start}"
freeze = ["*.experts.1.*", "*.embed_tokens.*"]
"""


def check_generation(model_folder: pathlib.Path) -> None:
    """Greedily, up to a token of the config.json's eos_token_id, as transformers does."""
    greedy = ["--ids", "1,2,3", "--temperature", "0", "--max-tokens", "8", "--json"]

    def generated() -> list[int]:
        done = collegium(BINARY, "generate", "--model", str(model_folder), *greedy)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)["ids"]

    config = json.loads((model_folder / "config.json").read_text())
    config["eos_token_id"] = [22, generated()[3]]
    (model_folder / "config.json").write_text(json.dumps(config))
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    theirs = model.generate(torch.tensor([[1, 2, 3]]), do_sample=False, max_new_tokens=8)[0, 3:].tolist()
    ours = generated()
    assert ours == theirs and ours[-1] in config["eos_token_id"], (ours, theirs)


def main() -> None:
    transformers.logging.set_verbosity_error()
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as temporary:
            folder = pathlib.Path(temporary)
            run_file = prepare(BINARY, folder, 6, family)
            ids = folder / "ids.safetensors"
            save_file({"input_ids": torch.arange(22).view(2, 11) % 23}, ids)
            start = checkpoint_of(collegium(BINARY, "train", str(run_file), "--json"))
            trained = eval_beside_transformers(BINARY, start, ids)
            tune_file = folder / "tune.toml"
            tune_file.write_text(TUNE_FILE.format(folder=folder, start=start))
            tuned = eval_beside_transformers(
                BINARY, checkpoint_of(collegium(BINARY, "train", str(tune_file), "--json")), ids
            )
            assert tuned != trained, "fine-tuning changed nothing"
            check_generation(start)
            print(f"{family:10} trained {trained:.5f}  fine-tuned {tuned:.5f}", flush=True)
    print(f"{3 * len(FAMILIES)} passed, 0 failed")


if __name__ == "__main__":
    main()
