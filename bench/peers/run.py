#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The same work in Collegium and in its peers, interleaved in one session.

layer  one MoE layer with SwiGLU experts, forward and backward: transformers (eager and grouped_mm), DeepSpeed-MoE (one
       process, and two ranks over Gloo), torchtitan, and `collegium bench layer`
step   a whole training step: transformers and `collegium bench step`, with peak memory

Every measurement is a process of its own. A peer's layer must give what a plain oracle gives before it is timed.
"""

import argparse
import contextlib
import hashlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import table
from environment import PYTHON, ROOT, make_environment, pinned_version
from shapes import DTYPES, LAYERS, STEPS
from systems import LAYER_SYSTEMS, PEERS, STEP_SYSTEMS, Setting, System, environment_of

WORKS = {"layer": (LAYERS, LAYER_SYSTEMS), "step": (STEPS, STEP_SYSTEMS)}
TIMEOUT_S = 900.0


def facts_of(arguments: argparse.Namespace) -> dict:
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        "unknown",
    )
    versions = "import torch, transformers; print(torch.__version__, transformers.__version__)"
    torch, transformers = subprocess.check_output([PYTHON, "-c", versions], text=True).split()
    return {
        "CPU": cpu,
        "threads": arguments.threads,
        "seconds": arguments.seconds,
        "torch": torch,
        "transformers": transformers,
        "deepspeed": pinned_version("deepspeed"),
        "torchtitan": pinned_version("torchtitan"),
        "binary": hashlib.sha256(arguments.collegium.read_bytes()).hexdigest()[:12],
    }


def measure(system: System, shape, setting: Setting) -> dict:
    """{"result": ...} or {"error": ...}"""
    process = subprocess.Popen(
        system.command(shape, setting),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment_of(system, setting.threads),
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return {"error": f"took longer than {TIMEOUT_S:.0f} s"}
    finally:
        # Whatever it has started must not run beside the next measurement, nor after an interrupt.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.returncode != 0:
        said = [line for line in stderr.splitlines() if line.strip()]
        return {"error": said[-1] if said else f"exit code {process.returncode}", "stderr": said[-20:]}
    try:
        return {"result": json.loads(stdout.strip().splitlines()[-1])}
    except (ValueError, IndexError):
        return {"error": "printed no result", "stdout": stdout[-1000:]}


def plan(arguments: argparse.Namespace) -> list[dict]:
    """All measurements in their order; each repetition begins with another system."""
    todo = []
    for repetition in range(arguments.repetitions):
        for work in arguments.work:
            shapes, systems = WORKS[work]
            for dtype in arguments.dtypes:
                own = [s for s in systems if s.peer in (*arguments.peers, "collegium") and DTYPES[dtype] in s.dtypes]
                turn = repetition % len(own)
                todo += [
                    {"work": work, "shape": name, "dtype": dtype, "repetition": repetition, "system": system.key}
                    for name in arguments.shapes
                    if name in shapes
                    for system in own[turn:] + own[:turn]
                ]
    return todo


def open_session(out: pathlib.Path, facts: dict) -> dict:
    """That of the file, which must have been measured alike, or a new one."""
    session = {"facts": facts, "records": []}
    if out.exists():
        before = json.loads(out.read_text())
        other = [
            f"{key} was {before['facts'].get(key, 'not recorded')}, is {value}"
            for key, value in facts.items()
            if before["facts"].get(key) != value
        ]
        if other:
            sys.exit(f"{out} was measured otherwise: {'; '.join(other)}; name another file with --out")
        session["records"] = [record for record in before["records"] if "result" in record]
    return session


def check_parameters(record: dict) -> None:
    """The models of a step must be of one size."""
    found = record.get("result", {}).get("parameters")
    want = STEPS[record["shape"]].parameters if record["work"] == "step" else None
    if found != want:
        record.pop("result")
        record["error"] = f"{found} parameters instead of {want}"


def run(arguments: argparse.Namespace) -> dict:
    session = open_session(arguments.out, facts_of(arguments))
    keys = ("work", "shape", "dtype", "repetition", "system")
    done = {tuple(record[key] for key in keys) for record in session["records"]}
    todo = [item for item in plan(arguments) if tuple(item[key] for key in keys) not in done]
    for number, record in enumerate(todo, 1):
        shapes, systems = WORKS[record["work"]]
        system = next(system for system in systems if system.key == record["system"])
        setting = Setting(DTYPES[record["dtype"]], arguments.seconds, arguments.threads, arguments.collegium)
        what = f"{record['work']} {record['dtype']} {record['shape']}, {system.title}"
        start = time.monotonic()
        record |= measure(system, shapes[record["shape"]], setting)
        if "result" in record:
            check_parameters(record)
        said = f"{1e3 * record['result']['seconds_median']:.1f} ms" if "result" in record else record["error"]
        print(f"[{number}/{len(todo)}] {what}: {said} ({time.monotonic() - start:.0f} s in all)", flush=True)
        session["records"].append(record)
        # An interrupt leaves the file as it was or as it is now.
        partial = arguments.out.with_suffix(".partial")
        partial.write_text(json.dumps(session, indent=1) + "\n")
        partial.replace(arguments.out)
    return session


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  ./dev bench --out layer.json --work layer --repetitions 10\n"
        "  ./dev bench --work step --shapes coarse --dtypes bf16 --peers transformers --seconds 10\n"
        "  ./dev bench --out layer.json --table\n",
    )
    several = {"nargs": "+", "metavar": "NAME"}
    shapes = list(dict.fromkeys([*LAYERS, *STEPS]))
    peers = [peer for peer in PEERS if peer != "collegium"]
    for name, choices in (("work", list(WORKS)), ("shapes", shapes), ("dtypes", list(DTYPES)), ("peers", peers)):
        parser.add_argument(f"--{name}", choices=choices, default=choices, help=", ".join(choices), **several)
    parser.add_argument("--repetitions", type=int, default=10, help="how often the systems take turns (10)")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement, warm-up not counted (3)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of every system")
    parser.add_argument("--collegium", type=pathlib.Path, default=ROOT / "build/bin/collegium", help="the binary")
    parser.add_argument("--statistic", choices=("median", "min"), default="median", help="of a measurement's runs")
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path("peers.json"),
        help="written after every measurement; if it exists, what is missing in it is measured (peers.json)",
    )
    parser.add_argument("--table", action="store_true", help="only print the tables of --out")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if arguments.table:
        print(table.tables(json.loads(arguments.out.read_text()), arguments.statistic))
        return
    if {"deepspeed", "torchtitan"} & set(arguments.peers) and "layer" in arguments.work:
        make_environment()
    if os.getloadavg()[0] > 0.5:
        print(f"the load is {os.getloadavg()[0]:.1f}: others are running on this machine", flush=True)
    # A shell that starts a command in the background has it ignore interrupts, and a termination would leave what is
    # being measured running.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        session = run(arguments)
    except KeyboardInterrupt:
        sys.exit(f"\ninterrupted; the same command goes on from {arguments.out}")
    print("\n" + table.tables(session, arguments.statistic))
    if any("error" in record for record in session["records"]):
        sys.exit(1)


if __name__ == "__main__":
    main()
