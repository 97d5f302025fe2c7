#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""`collegium bench`: fields of its JSON, bytes against the closed form under every skew, messages of bad flags.

bench itself compares each run's bytes with what the routing asks for and fails when they differ; here its formula is
held against one of this file for the balanced routing, and the rest is looked at in the JSON.
"""

import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import tomllib

from small_run import collegium, prepare

BINARY = sys.argv[1]
LAYER = ["--tokens", "96", "--hidden", "32", "--ffn", "24", "--experts", "8", "--top-k", "2", "--seconds", "0.01"]
STEP = ["--layers", "1", "--hidden", "16", "--ffn", "8", "--experts", "4", "--heads", "2", "--vocab", "40"]
STEP += ["--sequences", "4", "--length", "8"]
SKEWS = [f"W{i}" for i in range(8)]
DISPATCHERS = ["uneven", "padded", "allgather", "two_level", "shared_memory"]
ARROWS = ["dispatch", "combine", "combine backward", "dispatch backward"]
STAGES = ["router", "plan", "dispatch", "experts", "combine", "combine_backward", "expert_rows_backward"]


def bench(*arguments: str) -> dict:
    done = collegium(BINARY, "bench", *arguments, "--json")
    assert done.returncode == 0, f"{arguments}: {done.stderr}"
    return json.loads(done.stdout)


def local(ranks: int) -> list[str]:
    return ["--ranks", str(ranks), "--backend", "local"]


def refuses(message: str, *arguments: str) -> None:
    done = collegium(BINARY, "bench", *arguments)
    assert done.returncode == 2, f"{arguments}: exit code {done.returncode}: {done.stderr}"
    assert message in done.stderr, f"{arguments}: '{message}' is not in: {done.stderr}"


def total(result: dict, arrow: str, which: str) -> int:
    return result["bytes"][arrow][f"{which}within_nodes"] + result["bytes"][arrow][f"{which}between_nodes"]


def check_layer() -> None:
    for dtype in ["bfloat16", "float32", "float64"]:
        result = bench("layer", *LAYER, "--dtype", dtype, "--threads", "1")
        assert 0.0 < result["seconds_min"] <= result["seconds_median"] <= result["seconds_max"], result
        assert result["runs"] >= 3 and result["gemm_floor_seconds"] > 0.0 and result["gemm_peak_gflops"] > 0.0
        flops = 18 * 96 * 2 * 32 * 24
        assert math.isclose(result["gflops"], flops / result["seconds_min"] / 1e9, rel_tol=1e-6), result
        assert all(result["stage_seconds"][stage] > 0.0 for stage in STAGES), result["stage_seconds"]
        assert sum(result["stage_seconds"].values()) < 2.0 * result["seconds_max"], result
        assert all(total(result, arrow, "") == 0 for arrow in ARROWS), result["bytes"]
    learned = bench("layer", *LAYER, "--routing", "learned", "--ranks", "1")
    assert learned["skew"] is None and learned["routing"] == "learned"


def check_skews() -> None:
    for ranks in [2, 4]:
        for skew in SKEWS:
            for dispatcher in ["uneven", "padded"]:
                result = bench("layer", *LAYER, *local(ranks), "--skew", skew, "--dispatcher", dispatcher)
                for arrow in ARROWS:
                    assert total(result, arrow, "") == total(result, arrow, "expected_") > 0, (skew, result)
        balanced = bench("layer", *LAYER, *local(ranks))
        rows = 96 * 2 * (ranks - 1) // ranks
        assert total(balanced, "combine", "") == rows * 32 * 2, balanced["bytes"]
        assert total(balanced, "dispatch", "") == rows * (32 * 2 + 4), balanced["bytes"]
    hot = bench("layer", *LAYER, *local(2), "--skew", "W5")
    assert hot["rows_max_over_mean"] == 2.0, hot  # one of two ranks has all rows


def check_layouts() -> None:
    for dispatcher in DISPATCHERS:
        for overlap in [[], ["--overlap", "--chunks", "3"]]:
            num_nodes = 1 if dispatcher == "shared_memory" else 2
            nodes = ["--ranks-per-node", str(4 // num_nodes), "--routing", "random"]
            sums = ["--combine-fp32"] if dispatcher in ("allgather", "two_level") else []
            result = bench("layer", *LAYER, *local(4), *nodes, *overlap, "--dispatcher", dispatcher, *sums)
            assert result["nodes"] == num_nodes and result["chunks"] == (3 if overlap else 1), result
            for arrow in ARROWS:
                assert total(result, arrow, "") == total(result, arrow, "expected_") > 0, (dispatcher, result)
            if dispatcher == "two_level":
                between = result["bytes"]["combine backward"]["between_nodes"]
                assert between == result["remote_copies"] * 32 * 2, result
    emulated = ["--backend", "local", "--emulate", "nodes=2x1,intra=1GB/s:1us,inter=10MB/s:10us"]
    result = bench("layer", *LAYER, *emulated)
    assert result["ranks"] == 2 and result["all_to_all_seconds"] > 0.0, result
    replicas = bench("layer", *LAYER, *local(4), "--ep", "2")
    assert replicas["ep"] == 2 and replicas["ranks"] == 4 and replicas["dispatcher"] == "uneven", replicas
    top_4 = list(LAYER)
    top_4[LAYER.index("--top-k") + 1] = "4"
    result = bench("layer", *top_4, *local(2), "--dispatcher", "auto")
    assert result["dispatcher"] == "two_level", result


def check_step() -> None:
    ballast = b"x" * (1 << 30)  # the peak of who starts bench must not count as bench's
    alone = bench("step", *STEP, "--seconds", "0.01", "--micro", "2", "--dtype", "float32", "--recompute")
    assert alone["tokens_per_s"] > 0.0 and alone["bytes_within_nodes"] == 0, alone
    assert 1e6 < alone["peak_rss_bytes"] < len(ballast), alone
    del ballast
    many = bench(
        "step", *STEP, "--seconds", "0.01", *local(2), "--overlap", "--dispatcher", "padded", "--routing", "forced"
    )
    assert many["ranks"] == 2 and many["chunks"] == 2 and many["bytes_within_nodes"] > 0, many
    assert 0.0 < many["all_to_all_exposed_share"] <= many["all_to_all_share"] < 1.0, many
    assert many["phases"]["gradients"]["within_nodes_bytes"] > 0, many


def check_activations() -> None:
    """What is measured beside what is counted: of a rank, whether it has the process to itself or not."""
    shape = ["--layers", "3", "--hidden", "64", "--ffn", "48", "--experts", "8", "--top-k", "4", "--heads", "4"]
    shape += ["--vocab", "64", "--sequences", "8", "--length", "512", "--dtype", "float32", "--seconds", "0.01"]
    for ranks in [[], local(2), ["--ranks", "2"]]:
        found = bench("step", *shape, *ranks)["activation_bytes_per_token_and_layer"]
        # Tensors below 64 KiB are not counted, and the loss has not run.
        assert 0.8 < found["measured"] / found["counted"] < 1.2, (ranks, found)


def check_run_file() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        run_file = str(prepare(BINARY, folder, steps=1))
        result = bench("step", run_file, "--seconds", "0.01")
        assert result["vocab"] == 23 and result["hidden"] == 16 and result["sequences"] == 5, result
        result = bench("step", run_file, "--seconds", "0.01", "--set", "model.hidden_size=32")
        assert result["hidden"] == 32, result
        for flag in ["--hidden 64", "--vocab 8192", "--micro 0"]:
            refuses(f"{flag}: cannot be given beside the run file {run_file}", "step", run_file, *flag.split())
        refuses("--recompute true: cannot be given beside the run file", "step", run_file, "--recompute")
        (folder / "data" / "dataset.json").unlink()
        refuses("dataset.json", "step", run_file)


def check_interrupt() -> None:
    """The tokens' files lose their names before anything is measured."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        begun = folder.stat().st_mtime_ns
        command = [BINARY, "bench", "step", *STEP, "--seconds", "60"]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL, env=os.environ | {"TMPDIR": name}) as process:
            limit = time.monotonic() + 60.0
            while folder.stat().st_mtime_ns == begun or any(folder.iterdir()):
                assert time.monotonic() < limit and process.poll() is None, list(folder.iterdir())
                time.sleep(0.01)
            process.terminate()
        assert process.returncode != 0 and not any(folder.iterdir()), process.returncode


def check_cores() -> None:
    """The cores that count are those that the program may use."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        doctor = collegium(BINARY, "doctor", "--json")
        shape = [*LAYER, "--dtype", "float32", "--threads", "1"]
        alone, shared = bench("layer", *shape), bench("layer", *shape, *local(2))
    finally:
        os.sched_setaffinity(0, cores)
    assert doctor.returncode == 0 and json.loads(doctor.stdout)["cores"] == 1, doctor
    assert shared["gemm_peak_gflops"] < 1.5 * alone["gemm_peak_gflops"], (alone, shared)


def check_comm() -> None:
    result = bench("comm", *local(2), "--max-mib", "0.02", "--seconds", "0.001")
    verbs = {row["verb"] for row in result["rows"]}
    assert verbs == {"barrier", "memcpy", "all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast"}
    for row in result["rows"]:
        assert row["seconds_min"] > 0.0 and (row["bytes"] == 0 or row["fraction_of_memcpy"] > 0.0), row


def check_cluster() -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "measured.toml"
        network = ["--backend", "local", "--emulate", "nodes=2x1,intra=1GB/s:1us,inter=500MB/s:200us"]
        done = collegium(BINARY, "bench", "cluster", "--write", str(file), "--seconds", "0.002", *network)
        assert done.returncode == 0, done.stderr
        cluster = tomllib.loads(file.read_text())
        assert cluster["node_size"] == 1 and cluster["cores_per_rank"] >= 1, cluster
        accelerator = cluster["accelerator"]
        assert accelerator["peak_tflops"]["bf16"] > 0.0, accelerator
        assert accelerator["attention_length"] == 512 and 0.0 < accelerator["optimizer_efficiency"] <= 1.0, accelerator
        assert 0.05 < accelerator["step_efficiency"] < 2.0, accelerator
        link = cluster["slow_link"]
        assert link["all_to_all_latency_us"] >= 200.0 and 0.1 < link["all_to_all_gb_per_s"] < 0.6, link
        layout = ["--explain", "dp2.ep2", "--global-batch", "8", "--seq", "512"]
        planned = collegium(BINARY, "plan", "--model", "olmoe-1b-7b", "--cluster", str(file), *layout)
        assert planned.returncode == 0, planned.stderr


def check_sessions() -> None:
    """A session with other systems goes on from a file that was measured alike, and from no other."""
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "bench/peers"))
    import run

    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "session.json"
        records = [{"result": {}}, {"error": "took too long"}]
        out.write_text(json.dumps({"facts": {"threads": 2, "seconds": 3.0}, "records": records}))
        assert run.open_session(out, {"threads": 2, "seconds": 3.0})["records"] == records[:1]
        for facts in [{"threads": 2, "seconds": 1.0}, {"threads": 2, "seconds": 3.0, "deepspeed": "0.19.8"}]:
            try:
                run.open_session(out, facts)
            except SystemExit as refusal:
                changed = "seconds was 3.0, is 1.0" if len(facts) == 2 else "deepspeed was not recorded, is 0.19.8"
                assert changed in str(refusal), refusal
            else:
                raise AssertionError(facts)
    assert all(run.pinned_version(peer) for peer in ("deepspeed", "torchtitan"))


def check_refusals() -> None:
    refuses("--write cluster.txt: must end in .toml", "cluster", "--write", "cluster.txt")
    refuses("--seconds 0: must be positive", "cluster", "--write", "a.toml", "--seconds", "0")
    refuses("bench layer: rank 0 needs at least", "layer", "--hidden", "1000000000", "--ffn", "100000000000")
    refuses("batch.global_batch = 1000000000000: with data.sequence_", "step", "--sequences", "1000000000000")
    refuses("batch.global_batch = 2305843009213693953: ", "step", "--sequences", str(2**61 + 1), "--micro", "8")
    refuses("--micro 9: must not exceed --sequences = 8", "step", "--sequences", "8", "--micro", "9")
    refuses("--max-mib 1000000000000: must be at most", "comm", "--max-mib", "1e12", *local(2))
    refuses("network: foo: write name=value", "comm", "--emulate", "foo")
    refuses('network: nodes = "2": write nodes x ranks', "comm", "--emulate", "nodes=2,intra=1GB/s:1us,inter=1GB/s:1us")
    refuses("--top-k 9: must be between 1 and --experts = 8", "layer", "--top-k", "9")
    refuses("--tokens 0: must be at least 1", "layer", "--tokens", "0")
    refuses("--dtype", "layer", "--dtype", "float16")
    refuses('--skew = "W8"', "layer", "--skew", "W8")
    refuses('--dispatcher = "unevn": must be one of auto, uneven', "layer", "--dispatcher", "unevn")
    refuses("--skew W1: goes with --routing forced, not with learned", "layer", "--skew", "W1", "--routing", "learned")
    refuses("--seconds -1: must be positive", "layer", "--seconds", "-1")
    refuses("skew W5: a token chooses 5 of", "layer", "--top-k", "5", "--skew", "W5", *local(2))
    refuses("parallel.ep = 3: must divide the number of ranks, 2", "layer", *LAYER, "--ep", "3", *local(2))
    refuses("threads = 4294967297: must be at most", "layer", "--threads", "4294967297")
    refuses("--ranks 99999: must be at most 16384", "layer", "--ranks", "99999")
    many = 64 * (os.cpu_count() or 1) + 1
    if many <= 16384:
        refuses(f"ranks = {many}: this machine starts at most", "layer", "--backend", "local", "--ranks", str(many))
    network = "nodes=65536x65536,intra=1GB/s:1us,inter=1GB/s:1us"
    refuses("at most 16384 ranks in all", "layer", "--emulate", network)
    refuses("--ranks 2 or more", "comm")
    refuses("--max-mib 0.003: must be at least 0.00390625", "comm", "--max-mib", "0.003")
    uneven = ["--ranks-per-node", "2", "--seconds", "0.002"]
    message = "node 0 has 2 ranks and node 1 has 1; every node must have as many"
    refuses(message, "cluster", "--write", "uneven.toml", *local(3), *uneven)
    for dispatcher in ["auto", "uneven", "padded", "shared_memory"]:
        message = (
            f"--combine-fp32: needs --dispatcher two_level or allgather, which send partial sums, not {dispatcher}"
        )
        refuses(message, "layer", "--combine-fp32", "--dispatcher", dispatcher)
    message = "--combine-fp32: needs bfloat16; partial sums of float32 are as wide"
    refuses(message, "step", "--combine-fp32", "--dispatcher", "two_level", "--dtype", "float32")
    for work in ["layer", "step"]:
        refuses("--chunks 0: must be at least 1", work, "--chunks", "0")
    refuses("--micro 9: must not exceed --sequences = 8", "step", "--micro", "9")
    refuses("--set: needs a run file", "step", "--set", "train.dtype=float32")
    refuses("--sequences 0: must be at least 1", "step", "--sequences", "0")
    refuses("hidden_size = 512: must be a multiple of num_heads = 7", "step", "--heads", "7")
    refuses("head_dim = 9: the rotary embedding needs an even number", "step", "--hidden", "63", "--heads", "7")
    refuses("no verb 'layr'; did you mean 'layer'?", "layr")
    refuses("A subcommand is required")


def main() -> None:
    work = [check_layer, check_skews, check_layouts, check_step, check_activations, check_run_file, check_comm]
    for check in [*work, check_interrupt, check_cores, check_cluster, check_sessions, check_refusals]:
        check()
    print("bench: fields, bytes and messages are as they should be")


if __name__ == "__main__":
    main()
