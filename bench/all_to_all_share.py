#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The share of a training step that goes to all-to-all on 4 nodes of 8 GPUs, emulated with 32 ranks on a few cores.

Ranks are threads that really train; only the network is emulated: a message arrives no earlier than the described links
would have delivered it. For proportions to hold, the network must be as much slower than the real one as a rank here is
slower than a GPU there, and it must allow for the smaller model:

  bandwidth = real bandwidth * (rank FLOP/s / GPU FLOP/s) * (real width / width here)
  latency   = real latency * (time of a micro-step here / time of one there)

The rank's FLOP/s are measured without emulation, the GPU's are its peak times an assumed efficiency. The width factor
is there because, with every width divided by w, a token costs 1/w^2 of the FLOPs but 1/w of the bytes.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
NODES, RANKS_PER_NODE = 4, 8
RANKS = NODES * RANKS_PER_NODE
PUBLISHED = (44.4, 68.4)  # per cent of an iteration, as the field reports it without overlap
LENGTH, MICRO_STEPS, LAYERS = 128, 4, 2  # a rank has one sequence of a micro-step
REAL_TOKENS = 4096  # of a rank in a micro-step


@dataclasses.dataclass(frozen=True)
class Gpu:
    peak_flops: float  # bf16, dense
    intra: tuple[float, float]  # of a GPU to its node, each direction: bytes/s, latency in s
    inter: tuple[float, float]  # to other nodes


GPUS = {
    "a100": Gpu(312e12, (300e9, 2e-6), (25e9, 10e-6)),  # NVLink 3; one 200 Gbit/s port per GPU
    "a100-1port": Gpu(312e12, (300e9, 2e-6), (3.125e9, 10e-6)),  # the node's GPUs share one such port
    "h100": Gpu(989e12, (450e9, 2e-6), (50e9, 10e-6)),  # NVLink 4; one 400 Gbit/s port per GPU
}


@dataclasses.dataclass(frozen=True)
class Model:
    name: str
    note: str
    real_hidden: int
    real_ffn: int
    experts: int
    top_k: int
    shrink: int  # every width here is the real one divided by this
    heads: int

    @property
    def flags(self) -> list[str]:
        sizes = {
            "--hidden": self.real_hidden // self.shrink,
            "--ffn": self.real_ffn // self.shrink,
            "--experts": self.experts,
            "--top-k": self.top_k,
            "--heads": self.heads,
            "--layers": LAYERS,
            "--vocab": 384,
            "--length": LENGTH,
            "--sequences": RANKS * MICRO_STEPS,
            "--micro": RANKS,
        }
        return [part for flag, value in sizes.items() for part in (flag, str(value))]


MODELS = [
    Model("coarse, 8 experts", "Mixtral 8x7B's widths; ep 8 stays in a node", 4096, 14336, 8, 2, 32, 2),
    Model("coarse, 32 experts", "the same widths; ep 32", 4096, 14336, 32, 2, 32, 2),
    Model("fine, 64 experts", "OLMoE's widths; ep 32", 2048, 1024, 64, 8, 16, 2),
]
VARIANTS = {
    "uneven": ["--dispatcher", "uneven"],
    "uneven, overlap": ["--dispatcher", "uneven", "--overlap"],
    "two_level": ["--dispatcher", "two_level"],
    "two_level, overlap": ["--dispatcher", "two_level", "--overlap"],
}


def run_step(binary: pathlib.Path, arguments: list[str], seconds: float) -> dict:
    command = [str(binary), "bench", "step", "--backend", "local", "--seconds", str(seconds), "--json", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    return json.loads(done.stdout)


def emulation(model: Model, gpu: Gpu, efficiency: float, plain: dict) -> tuple[str, dict]:
    """The --emulate text for this model, and how it came about."""
    rank_flops = plain["gflops"] * 1e9 / RANKS
    gpu_flops = gpu.peak_flops * efficiency
    slower = gpu_flops / rank_flops
    bandwidth = model.shrink / slower
    latency = slower / model.shrink**2 * LENGTH / REAL_TOKENS
    links = [
        f"{name}={link[0] * bandwidth:.0f}B/s:{link[1] * latency * 1e6:.1f}us"
        for name, link in (("intra", gpu.intra), ("inter", gpu.inter))
    ]
    facts = {"rank_gflops": rank_flops / 1e9, "gpu_tflops": gpu_flops / 1e12, "slower": slower}
    return f"nodes={NODES}x{RANKS_PER_NODE},{','.join(links)}", facts


def measure(arguments: argparse.Namespace) -> list[dict]:
    rows = []
    for model in MODELS:
        plain = run_step(arguments.binary, ["--ranks", str(RANKS), *model.flags], arguments.seconds)
        text, facts = emulation(model, GPUS[arguments.gpu], arguments.efficiency, plain)
        print(f"\n{model.name} ({model.note}): every width 1/{model.shrink} of the real one", flush=True)
        print(
            f"  a rank here {facts['rank_gflops']:.2f} GFLOP/s, a GPU {facts['gpu_tflops']:.0f} TFLOP/s "
            f"({facts['slower']:.0f} times faster)\n  --emulate {text}",
            flush=True,
        )
        print("  dispatch             step    all_to_all  exposed   hidden  sent to other nodes", flush=True)
        for name, flags in VARIANTS.items():
            if model.experts < RANKS and name.startswith("two_level"):
                continue  # the group is one node
            result = run_step(arguments.binary, ["--emulate", text, *model.flags, *flags], arguments.seconds)
            row = {
                "model": model.name,
                "variant": name,
                "gpu": arguments.gpu,
                "step_seconds": result["seconds_median"],
                "share": 100.0 * result["all_to_all_share"],
                "exposed": 100.0 * result["all_to_all_exposed_share"],
                "hidden": 100.0 * result["hidden_share"],
                "between_nodes_bytes": sum(
                    result["phases"][phase]["between_nodes_bytes"]
                    for phase in ("dispatch", "combine", "combine backward", "dispatch backward")
                ),
                "compute_seconds": plain["seconds_median"],
                **facts,
            }
            rows.append(row)
            print(
                f"  {name:<18} {row['step_seconds']:>6.2f} s {row['share']:>9.1f} % {row['exposed']:>7.1f} % "
                f"{row['hidden']:>6.1f} % {row['between_nodes_bytes'] / RANKS / 1e6:>9.2f} MB/rank",
                flush=True,
            )
    return rows


def svg(rows: list[dict], title: str) -> str:
    """Bars: the whole is all_to_all under way, the dark part is what the ranks stood still for."""
    left, top, height, bar, gap, group_gap = 56, 64, 260, 34, 8, 36
    colours = {
        "uneven": ("#9ecae1", "#2171b5"),
        "uneven, overlap": ("#a1d99b", "#238b45"),
        "two_level": ("#fdd0a2", "#d94801"),
        "two_level, overlap": ("#dadaeb", "#6a51a3"),
    }

    def y(percent: float) -> float:
        return top + height * (1.0 - percent / 100.0)

    parts, x, labels = [], left + 16, []
    for model in dict.fromkeys(row["model"] for row in rows):
        start = x
        for row in (row for row in rows if row["model"] == model):
            light, dark = colours[row["variant"]]
            for value, colour in ((row["share"], light), (row["exposed"], dark)):
                parts.append(
                    f'<rect x="{x}" y="{y(value):.1f}" width="{bar}" height="{y(0) - y(value):.1f}" fill="{colour}"/>'
                )
            parts.append(
                f'<text x="{x + bar / 2}" y="{y(row["share"]) - 4:.1f}" text-anchor="middle">{row["share"]:.0f}</text>'
            )
            x += bar + gap
        labels.append(f'<text x="{(start + x - gap) / 2}" y="{y(0) + 18}" text-anchor="middle">{model}</text>')
        x += group_gap
    width = x + 8
    axis = [
        f'<line x1="{left}" x2="{width - 8}" y1="{y(p)}" y2="{y(p)}" stroke="#ccc"/>'
        f'<text x="{left - 6}" y="{y(p) + 4}" text-anchor="end">{p} %</text>'
        for p in range(0, 101, 20)
    ]
    band = (
        f'<rect x="{left}" y="{y(PUBLISHED[1]):.1f}" width="{width - 8 - left}" '
        f'height="{y(PUBLISHED[0]) - y(PUBLISHED[1]):.1f}" fill="#e0e0e0" opacity="0.6"/>'
        f'<text x="{width - 12}" y="{y(PUBLISHED[1]) - 4:.1f}" text-anchor="end" fill="#666">'
        f"published without overlap: {PUBLISHED[0]}-{PUBLISHED[1]} %</text>"
    )
    legend = [
        f'<rect x="{left + 150 * i}" y="{y(0) + 34}" width="12" height="12" fill="{dark}"/>'
        f'<text x="{left + 150 * i + 17}" y="{y(0) + 44}">{name}</text>'
        for i, (name, (_, dark)) in enumerate(colours.items())
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y(0) + 60:.0f}" '
            'font-family="sans-serif" font-size="12">',
            f'<rect width="{width}" height="{y(0) + 60:.0f}" fill="white"/>',
            f'<text x="{left}" y="22" font-size="15">{title}</text>',
            f'<text x="{left}" y="40" fill="#666">share of a training step; the dark part is exposed</text>',
            band,
            *axis,
            *parts,
            *labels,
            *legend,
            "</svg>",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", type=pathlib.Path, default=ROOT / "build/bin/collegium")
    parser.add_argument("--gpu", choices=GPUS, default="a100")
    parser.add_argument("--efficiency", type=float, default=0.4, help="of the GPU's peak that its computation reaches")
    parser.add_argument("--seconds", type=float, default=6.0, help="measure each variant for about this long")
    parser.add_argument("--svg", type=pathlib.Path, help="write the picture here")
    parser.add_argument("--json", type=pathlib.Path, help="write the rows here")
    arguments = parser.parse_args()
    start = time.monotonic()
    rows = measure(arguments)
    if arguments.svg:
        arguments.svg.write_text(svg(rows, f"All-to-all on 4 x 8 {arguments.gpu.upper()}, emulated"))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"\npublished without overlap: {PUBLISHED[0]}-{PUBLISHED[1]} %; this took {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
