#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A run that is killed at random moments and continued equals the uninterrupted one, bit for bit."""

import json
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

from safetensors.torch import load_file
from small_run import collegium, prepare

STEPS = 60
KILLS = 12


def losses(folder: pathlib.Path) -> list[tuple]:
    records = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    return [(record["kind"], record["step"], record["loss"]) for record in records]


def final_tensors(folder: pathlib.Path) -> dict:
    checkpoint = folder / f"run/step-{STEPS:08}"
    return {**load_file(checkpoint / "model.safetensors"), **load_file(checkpoint / "training/optimizer.safetensors")}


def main() -> None:
    binary = sys.argv[1]
    generator = random.Random(1)
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        whole, killed = pathlib.Path(first), pathlib.Path(second)
        run_file = prepare(binary, whole, STEPS)
        started = time.monotonic()
        done = collegium(binary, "train", str(run_file))
        duration = time.monotonic() - started
        assert done.returncode == 0, done.stderr

        run_file = prepare(binary, killed, STEPS)
        interrupted = 0
        for _ in range(KILLS):
            process = subprocess.Popen([binary, "train", str(run_file)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            time.sleep(generator.uniform(0.3, 0.9) * duration)
            process.send_signal(signal.SIGKILL)
            process.wait()
            interrupted += process.returncode == -signal.SIGKILL
        assert interrupted > 0, "no run was killed before its end"

        process = subprocess.Popen([binary, "train", str(run_file), "--json"], stdout=subprocess.PIPE, text=True)
        time.sleep(0.4 * duration)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate()
        assert process.returncode == 0, "a stop signal ends the run cleanly"
        assert pathlib.Path(json.loads(output)["checkpoint"]).exists()

        done = collegium(binary, "train", str(run_file))
        assert done.returncode == 0, done.stderr
        assert losses(killed) == losses(whole), "the metrics differ"
        ours, reference = final_tensors(killed), final_tensors(whole)
        assert set(ours) == set(reference)
        for name, tensor in reference.items():
            assert tensor.equal(ours[name]), f"{name} differs"
        assert not list((killed / "run").glob("*.tmp-*")), "temporary folders are left"
    print(f"{interrupted} of {KILLS} runs were killed; 1 passed, 0 failed")


if __name__ == "__main__":
    main()
