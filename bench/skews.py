#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Dispatchers beside each other: uneven against padded under the routings W0-W7, two_level against uneven across nodes.

Every number of bytes was compared with its closed form by `collegium bench layer` itself, which fails otherwise; the
copies that cross nodes are printed beside the exact count on the same routing and its expectation.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
SKEWS = {
    "W0": "balanced",
    "W1": "hot expert",
    "W2": "hot rank",
    "W3": "hot experts on all ranks",
    "W4": "ragged source",
    "W5": "a rank without rows",
    "W6": "rotating hot expert",
    "W7": "bursts",
}
ARROWS = ["dispatch", "combine", "combine backward", "dispatch backward"]
SHAPES = {
    "coarse": ["--experts", "8", "--top-k", "2", "--ffn", "896"],
    "fine": ["--experts", "64", "--top-k", "8", "--ffn", "128"],
}
NETWORK = "intra=3GB/s:20us,inter=500MB/s:100us"


class Bench:
    def __init__(self, binary: pathlib.Path, seconds: float) -> None:
        self.binary, self.seconds = binary, seconds

    def layer(self, *arguments: str) -> dict:
        command = [str(self.binary), "bench", "layer", "--seconds", str(self.seconds), "--json", *arguments]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode != 0:
            sys.exit(f"{' '.join(command)}\n{done.stderr}")
        return json.loads(done.stdout)


def sent(result: dict) -> int:
    return sum(result["bytes"][arrow]["within_nodes"] + result["bytes"][arrow]["between_nodes"] for arrow in ARROWS)


def between(result: dict) -> int:
    return sum(result["bytes"][arrow]["between_nodes"] for arrow in ARROWS)


def compare_skews(bench: Bench, ranks: int, backend: str, shape: str) -> None:
    print(f"\n{shape} ({' '.join(SHAPES[shape])}), {ranks} ranks, {backend}: forward + backward, all ranks' bytes\n")
    print("| routing | busiest rank's rows / mean | uneven | padded | bytes uneven | bytes padded | padded / uneven |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for skew, meaning in SKEWS.items():
        results = [
            bench.layer(
                *SHAPES[shape],
                "--ranks",
                str(ranks),
                "--backend",
                backend,
                "--skew",
                skew,
                "--dispatcher",
                kind,
            )
            for kind in ("uneven", "padded")
        ]
        times = [f"{1e3 * result['seconds_median']:.1f} ms" for result in results]
        volumes = [sent(result) for result in results]
        print(
            f"| {skew} {meaning} | {results[0]['rows_max_over_mean']:.2f} | {times[0]} | {times[1]} | "
            f"{volumes[0] / 1e6:.2f} MB | {volumes[1] / 1e6:.2f} MB | {volumes[1] / volumes[0]:.2f} |",
            flush=True,
        )


def compare_nodes(bench: Bench, shape: str) -> None:
    print(f"\n{shape} ({' '.join(SHAPES[shape])}), random routing, emulated {NETWORK}\n")
    print("| nodes | dispatcher | time | sent to other nodes | copies per token that cross | exact | D(G)(1-1/G) |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for nodes in ("2x2", "4x2"):
        for kind in ("uneven", "two_level"):
            result = bench.layer(
                *SHAPES[shape],
                "--backend",
                "local",
                "--routing",
                "random",
                "--dispatcher",
                kind,
                "--emulate",
                f"nodes={nodes},{NETWORK}",
            )
            tokens = result["tokens"]
            crossing = result["bytes"]["combine backward"]["between_nodes"] / (2 * result["hidden"])
            print(
                f"| {nodes} | {kind} | {1e3 * result['seconds_median']:.0f} ms | {between(result) / 1e6:.2f} MB | "
                f"{crossing / tokens:.4f} | {result['remote_copies'] / tokens:.4f} | "
                f"{result['expected_remote_copies'] / tokens:.4f} |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", type=pathlib.Path, default=ROOT / "build/bin/collegium")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--backend", default="local")
    parser.add_argument("--seconds", type=float, default=2.0, help="measure each line for about this long")
    arguments = parser.parse_args()
    if arguments.ranks < 2:
        parser.error("--ranks: at least 2")
    bench = Bench(arguments.binary, arguments.seconds)
    for shape in SHAPES:
        compare_skews(bench, arguments.ranks, arguments.backend, shape)
    for shape in SHAPES:
        compare_nodes(bench, shape)


if __name__ == "__main__":
    main()
