#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The verbs plan and simulate as a user runs them: exit codes, messages, JSON."""

import json
import pathlib
import subprocess
import sys
import tempfile

BINARY = sys.argv[1]
ROOT = pathlib.Path(__file__).resolve().parents[2]


def run(code: int, text: str, *arguments: str) -> str:
    words = [word for argument in arguments for word in argument.split()]
    done = subprocess.run([BINARY, *words], capture_output=True, text=True, check=False)
    output = done.stdout if code == 0 else done.stderr
    assert done.returncode == code, f"{arguments}: exit code {done.returncode}, expected {code}: {done.stderr}"
    assert text in output, f"{arguments}: '{text}' is not in: {output}"
    return done.stdout


def check_combinations() -> None:
    """An option that would be ignored is refused."""
    model = "plan --model mixtral-8x7b"
    run(2, "give one of --model, --compare", "plan")
    run(2, "--model and --compare exclude each other", model, "--compare")
    run(2, "--shares and --list exclude each other", "plan --shares --list")
    run(2, "--cluster needs --gpus or --explain or --shares", model, "--cluster h100-80")
    run(2, "--precision needs --gpus or --explain", model, "--precision bf16")
    run(2, "--global-batch needs --gpus or --explain", model, "--global-batch 8")
    run(2, "--imbalance needs --gpus or --explain", model, "--imbalance 2")
    run(2, "--seq needs --model or --shares", "plan --compare --seq 4096")
    run(2, "--gpus needs --model", "plan --compare --gpus 8")
    run(2, "--top needs --gpus", model, "--top 3")
    run(2, "--rows needs --validate", model, "--rows")
    run(2, "--data-parallel needs --gpus or --explain", model, "--data-parallel")
    searched = f"{model} --gpus 64 --global-batch 256"
    run(2, "--gpus and --explain exclude each other", searched, "--explain dp8")
    run(2, "--data-parallel and --top exclude each other", searched, "--data-parallel --top 3")
    run(2, "--seq = 0", "plan --shares --seq 0")
    run(2, "--top", searched, "--top 0")
    run(2, "--cluster h101-80: neither a cluster", searched, "--cluster h101-80")
    found = json.loads(run(0, "{", searched, "--json --top 100000"))
    assert len(found["ranked"]) == found["fitting"], "the ranking is cut"


def check_schedules_of_layouts() -> None:
    explain = "plan --model llama3-8b --global-batch 64 --json --explain"
    for given, expected in (("pp4.vp2", "interleaved"), ("pp4.zb", "zb"), ("pp4.gpipe", "gpipe"), ("pp4", "1f1b")):
        assert json.loads(run(0, "{", explain, given))["layout"].endswith("." + expected), given
    for data_parallel in ("", "--data-parallel"):
        run(2, "only the interleaved schedule has them, gpipe has not", explain, "pp4.dp2.vp2.gpipe", data_parallel)


def main() -> None:
    check_combinations()
    check_schedules_of_layouts()
    for option in ("--validate", "--model", "--model llama3-8b --gpus 8 --global-batch 8 --cluster"):
        run(2, "File name too long", "plan", option, "x" * 300)
    run(0, "46,702,792,704", "plan", "--model", "mixtral-8x7b")
    assert json.loads(run(0, "{", "plan", "--model", "deepseek-v3", "--json"))["total"] == 671026404352
    run(0, "Examples", "plan", "--help")
    run(0, "Examples", "simulate", "--help")
    run(2, "did you mean mixtral-8x7b", "plan", "--model", "mixtral-8x7")
    run(2, "--global-batch is missing", "plan", "--model", "mixtral-8x7b", "--gpus", "8")
    run(2, "has no experts", "plan --model llama3-8b --explain dp8.ep8 --global-batch 8")
    run(2, "layout part tp0", "plan --model llama3-8b --explain tp0 --global-batch 8")
    search = json.loads(run(0, "{", "plan --model mixtral-8x7b --gpus 64 --global-batch 256 --json"))
    assert search["ranked"] and search["rejected"] and search["front"]
    explained = json.loads(run(0, "{", "plan --model mixtral-8x7b --explain pp2.dp8.ep8 --global-batch 64 --json"))
    dispatch = [line for line in explained["traffic"] if line["operation"] == "dispatch"]
    assert dispatch, explained
    run(0, "predicted gain", "plan", "--compare")
    run(0, "fine-grained", "plan", "--shares", "--cluster", "a100-80-4rail")
    shares = json.loads(run(0, "{", "plan --shares --json --cluster a100-80-4rail"))
    assert [(m["kind"], m["ranks"]) for m in shares["models"]] == [
        ("coarse", 2),
        ("coarse", 32),
        ("fine-grained", 2),
        ("fine-grained", 32),
    ]
    assert all(0.0 < v["share"] < 1.0 for m in shares["models"] for v in m["variants"])
    run(0, "share of the step", "plan --model olmoe-1b-7b --explain dp32.ep32 --global-batch 64")
    variants = json.loads(run(0, "[", "plan --model llama3-8b --gpus 64 --global-batch 256 --data-parallel --json"))
    assert [v["variant"].split()[0] for v in variants] == ["parameter", "parameter", "all-reduce"] + ["ZeRO"] * 3
    run(2, "there is one replica only", "plan --model llama3-8b --explain pp2 --global-batch 8 --data-parallel")
    for bad in ("--global-batch nan", "--global-batch 8.5", "--global-batch 8 --seq inf", "--global-batch -8"):
        run(2, "a whole number", "plan --model mixtral-8x7b --gpus 8", bad)
        run(2, "a whole number", "simulate --layout pp4.dp8.ep8", bad)
    run(2, "precision = int8", "plan --model mixtral-8x7b --gpus 8 --global-batch 8 --precision int8")
    run(
        2, "has no peak_tflops.fp8", "simulate --layout pp4.dp8.ep8 --global-batch 64 --cluster a100-80 --precision fp8"
    )
    for bad in ("nan", "inf", "-1"):
        run(2, "must be finite and not negative", "simulate --layout pp4.dp8.ep8 --global-batch 64 --skew", bad)
    run(0, "idle", "simulate --layout pp4.dp8.ep8 --global-batch 64 --skew 1000")
    run(2, "llama3-8b has no experts", "simulate --layout dp8 --global-batch 64 --skew 2 --model llama3-8b")
    run(2, "--skew: with ep = 1", "simulate --layout dp8 --global-batch 64 --skew 2")
    run(2, "--seed = 3 needs --skew", "simulate --layout dp8.ep8 --global-batch 64 --seed 3")
    run(0, "cpu-2core", "plan", "--list")
    with tempfile.TemporaryDirectory() as folder:
        trace = pathlib.Path(folder) / "trace.json"
        run(0, "idle", "simulate --layout pp4.dp8.ep8 --global-batch 64 --trace", str(trace))
        assert json.loads(trace.read_text())["traceEvents"]
        run(2, "not a routing record", "simulate --layout pp4.dp8.ep8 --global-batch 64 --routing", str(trace))
        cluster = pathlib.Path(folder) / "cluster.toml"
        cluster.write_text("[accelerator]\nmemory_gb_per_s = nan\n")
        for key, value, rule in (
            ("attention_length", "-1", "must not be negative"),
            ("optimizer_efficiency", "1.5", "must lie in [0, 1]"),
            ("step_efficiency", "-0.1", "must lie in [0, 2]"),
        ):
            bad = pathlib.Path(folder) / "bad.toml"
            base = (ROOT / "configs/clusters/cpu-2core.toml").read_text()
            bad.write_text(
                "".join(line for line in base.splitlines(keepends=True) if not line.startswith(key)).replace(
                    "[accelerator]\n", f"[accelerator]\n{key} = {value}\n"
                )
            )
            run(
                2,
                f"accelerator.{key} = {value}: {rule}",
                "plan --model llama3-8b --gpus 2 --global-batch 8 --cluster",
                str(bad),
            )
        run(2, "must be finite", "plan --model llama3-8b --gpus 8 --global-batch 8 --cluster", str(cluster))
        rows = pathlib.Path(folder) / "rows.csv"
        rows.write_text("name,metric\nx\n")
        run(2, "no column value", "plan", "--validate", str(rows))
    schedules = json.loads(
        run(0, "[", "simulate --layout pp4.dp8 --model llama3-8b --global-batch 128 --schedules --json")
    )
    assert [s["schedule"] for s in schedules] == ["gpipe", "1f1b", "interleaved", "zb", "dualpipe"]
    print("plan and simulate: all checks passed")


if __name__ == "__main__":
    main()
