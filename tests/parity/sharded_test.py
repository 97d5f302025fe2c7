#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Models that were written here in many shards, read by transformers and by `collegium eval`."""

import pathlib
import subprocess
import sys
import tempfile

import torch
import transformers
from compare import check
from safetensors.torch import save_file

WRITER = sys.argv[2]


def main() -> None:
    transformers.logging.set_verbosity_error()
    torch.manual_seed(5)
    checks = 0
    with tempfile.TemporaryDirectory() as temporary:
        models = pathlib.Path(temporary)
        subprocess.run([WRITER, str(models)], check=True)
        for written in sorted(models.iterdir()):
            shards = list(written.glob("model-*-of-*.safetensors"))
            assert len(shards) >= 4 and (written / "model.safetensors.index.json").exists(), shards
            with tempfile.TemporaryDirectory() as scratch:
                folder = pathlib.Path(scratch)
                (folder / "model").symlink_to(written)
                save_file({"input_ids": torch.randint(0, 37, (3, 11))}, folder / "ids.safetensors")
                worst = check(written.name, folder, "float64")
                print(f"{written.name:10} {len(shards)} shards  float64 {worst:.2e}", flush=True)
                checks += 1
    print(f"{checks} passed, 0 failed")


if __name__ == "__main__":
    main()
