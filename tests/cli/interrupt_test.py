#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Verbs that work in a temporary folder remove it when a signal ends them."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

BINARY = sys.argv[1]


def interrupt(scratch: pathlib.Path, pattern: str, number: signal.Signals, *arguments: str) -> None:
    """Sends the signal to all processes, as a terminal would, once the folder is there."""
    environment = {**os.environ, "TMPDIR": str(scratch)}
    process = subprocess.Popen(
        [BINARY, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    end = time.monotonic() + 60
    while not list(scratch.glob(pattern)):
        assert process.poll() is None and time.monotonic() < end, f"{arguments}: no {pattern}: {process.stderr.read()}"
        time.sleep(0.005)
    os.killpg(process.pid, number)
    process.communicate(timeout=60)
    assert process.returncode != 0, f"{arguments}: was not interrupted"
    left = [path.name for path in scratch.glob(pattern)]
    assert not left, f"{arguments} and {number.name}: left {left}"


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        scratch = pathlib.Path(name)
        words = random.Random(1)
        text = "\n".join(" ".join("".join(words.choices("abcdefghij", k=6)) for _ in range(12)) for _ in range(60_000))
        (scratch / "text").mkdir()
        (scratch / "text/words.txt").write_text(text)
        for number in (signal.SIGINT, signal.SIGTERM):
            out = str(scratch / "data")
            interrupt(scratch, "data.tmp-*", number, "prepare", "--out", out, "--domain", f"text={scratch}/text")
            assert not pathlib.Path(out).exists()
            interrupt(scratch, "collegium-verify-*", number, "verify", "--ranks", "2", "--backend", "local")
            interrupt(scratch, "collegium-verify-*", number, "verify", "--ranks", "2")
    print("nothing was left behind")


if __name__ == "__main__":
    main()
