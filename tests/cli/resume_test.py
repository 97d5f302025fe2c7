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

import torch
from safetensors.torch import load_file, save_file
from small_run import collegium, prepare

STEPS = 80
KILLS = 12


def losses(folder: pathlib.Path) -> list[tuple]:
    records = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    return [(record["kind"], record["step"], record["loss"]) for record in records if "loss" in record]


def wait_for_steps(process: subprocess.Popen, folder: pathlib.Path, count: int) -> None:
    """Waits until the running process has written `count` records of its own: kills follow progress, not the clock."""
    metrics = folder / "run/metrics.jsonl"

    def version() -> tuple:
        return (metrics.stat().st_size, metrics.stat().st_mtime_ns) if metrics.exists() else (0, 0)

    seen = version()
    while count > 0 and process.poll() is None:
        now = version()
        count -= now != seen
        seen = now
        time.sleep(0.0005)


def final_tensors(folder: pathlib.Path) -> dict:
    checkpoint = folder / f"run/step-{STEPS:08}"
    return {
        **load_file(checkpoint / "model.safetensors"),
        **load_file(checkpoint / "training/optimizer-00000.safetensors"),
    }


def expect_fresh_left_out_of_the_advice(binary: str, folder: pathlib.Path, run_file: pathlib.Path) -> None:
    command = [binary, "train", str(run_file), "--fresh"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_steps(process, folder, 2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate()
    assert process.returncode == 0 and "run the same command without --fresh to continue" in output, output


def expect_other_data_refused(binary: str, folder: pathlib.Path, run_file: pathlib.Path) -> None:
    """Other tokens under the same path are another run."""
    other = folder / "other.safetensors"
    save_file({"input_ids": torch.arange(5000) % 23}, other)
    arguments = ["--force", "--out", f"{folder}/data", "--tokens", f"up={other}", "--vocab-size", "23"]
    done = collegium(binary, "prepare", *arguments)
    assert done.returncode == 0, done.stderr
    done = collegium(binary, "train", str(run_file))
    assert done.returncode == 2 and "was made with other data than is in" in done.stderr, done.stderr


def main() -> None:
    binary = sys.argv[1]
    generator = random.Random(1)
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        whole, killed = pathlib.Path(first), pathlib.Path(second)
        run_file = prepare(binary, whole, STEPS)
        done = collegium(binary, "train", str(run_file))
        assert done.returncode == 0, done.stderr

        run_file = prepare(binary, killed, STEPS)
        for _ in range(KILLS):
            process = subprocess.Popen([binary, "train", str(run_file)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            wait_for_steps(process, killed, generator.randint(1, 6))
            time.sleep(generator.uniform(0, 0.01))
            process.send_signal(signal.SIGKILL)
            process.communicate()
            assert process.returncode == -signal.SIGKILL, "the run ended before it was killed"

        process = subprocess.Popen([binary, "train", str(run_file), "--json"], stdout=subprocess.PIPE, text=True)
        wait_for_steps(process, killed, 2)
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
        expect_other_data_refused(binary, killed, run_file)
        expect_fresh_left_out_of_the_advice(binary, whole, whole / "run.toml")
    print(f"{KILLS} runs were killed; 1 passed, 0 failed")


if __name__ == "__main__":
    main()
