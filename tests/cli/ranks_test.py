#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The verbs on several ranks: the same results as one rank, one message when something fails, and nothing hangs."""

import itertools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import torch
from safetensors.torch import load_file, save_file
from small_run import collegium, prepare

BINARY = sys.argv[1]
MPIRUN = sys.argv[2] if len(sys.argv) > 2 else ""
BACKENDS = ["local", "mpi"] if MPIRUN else ["local"]
MPIRUN_COMMAND = [MPIRUN, "--allow-run-as-root", "--oversubscribe", "--bind-to", "none"]
BOUND = 1e-11  # float64: the order of summation alone differs
CHECKS = 0


def passed(condition: bool, what: object) -> None:
    global CHECKS
    assert condition, what
    CHECKS += 1


def run(*arguments: str, code: int = 0, env: dict | None = None, prefix: tuple = ()) -> subprocess.CompletedProcess:
    command = [*prefix, BINARY, *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=60, env={**os.environ, **(env or {})}
    )
    passed(done.returncode == code, f"{command}: exit code {done.returncode}, expected {code}: {done.stderr}")
    return done


def expect_message(code: int, message: str, *arguments: str) -> None:
    """One line on standard error, from one rank, without what mpirun has to say."""
    lines = run(*arguments, code=code).stderr.strip().splitlines()
    passed(len(lines) == 1 and lines[0].startswith("collegium: "), f"{arguments}: not one message: {lines}")
    passed(message in lines[0], f"{arguments}: '{message}' is not in: {lines[0]}")


def with_balance_loss(model: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """A copy whose gradients have a part that depends on the routing of all ranks."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    config.update(output_router_logits=True, router_aux_loss_coef=0.1)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def without_end(model: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """A copy that generates for hours."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = 10**7
    config["eos_token_id"] = None
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def check_eval(model: pathlib.Path, ids: str, scratch: pathlib.Path) -> None:
    def evaluate(name: str, *options: str) -> tuple[dict, dict]:
        logits, gradients = scratch / f"{name}.logits", scratch / f"{name}.gradients"
        files = ["--logits", str(logits), "--grads", str(gradients)]
        arguments = ["eval", "--model", str(model), "--input", ids, "--dtype", "float64", "--json", *files, *options]
        return json.loads(run(*arguments).stdout), {**load_file(logits), **load_file(gradients)}

    reference, reference_tensors = evaluate("one")
    passed(reference["aux_loss"] > 0 and reference["total_loss"] > reference["loss"], reference)
    # 5 sequences and 4 experts: shares that differ, on 7 ranks empty ones and experts with one rank in seven.
    for backend, ranks in [(b, n) for b in BACKENDS for n in ((2, 3, 7) if b == "local" else (2, 3))]:
        name = f"{backend}-{ranks}"
        result, tensors = evaluate(name, "--ranks", str(ranks), "--backend", backend)
        passed(result["num_targets"] == reference["num_targets"], name)
        for key in ("loss", "aux_loss", "total_loss"):
            difference = abs(result[key] - reference[key]) / abs(reference[key])
            passed(difference <= BOUND, f"{name}: {key} differs by {difference}")
        passed(set(tensors) == set(reference_tensors), f"{name}: other tensors")
        for key, expected in reference_tensors.items():
            difference = (tensors[key] - expected).norm() / max(expected.norm(), 1e-12)
            passed(difference <= BOUND, f"{name}: {key} differs by {difference}")


def check_text_verbs(model: pathlib.Path, ids: str, data: str) -> None:
    sampled = ["--ids", "1,2,3", "--temperature", "0.8", "--max-tokens", "9", "--dtype", "float64", "--json"]
    generate = ["generate", "--model", str(model), *sampled]
    row = str(pathlib.Path(data).parent / "row.safetensors")
    save_file({"input_ids": load_file(ids)["input_ids"][:1].contiguous()}, row)
    inspect = ["inspect", "--model", str(model), "--input", row, "--dtype", "float64"]
    evaluate = ["eval", "--model", str(model), "--data", data, "--sequence-length", "16", "--dtype", "float64"]
    tokens = json.loads(run(*generate).stdout)["ids"]
    routed = [run(*inspect).stdout, run(*inspect, "--json").stdout]
    loss = json.loads(run(*evaluate, "--json").stdout)["loss"]
    for backend, ranks in [(b, n) for b in BACKENDS for n in ((2, 3) if b == "local" else (3,))]:
        launch = ["--ranks", str(ranks), "--backend", backend]
        passed(json.loads(run(*generate, *launch).stdout)["ids"] == tokens, f"{launch}: other tokens")
        passed(run(*inspect, *launch).stdout == routed[0], f"{launch}: other experts")
        passed(run(*inspect, "--json", *launch).stdout == routed[1], f"{launch}: other experts")
        difference = abs(json.loads(run(*evaluate, "--json", *launch).stdout)["loss"] - loss)
        passed(difference <= BOUND * loss, f"{launch}: validation loss differs by {difference}")
    emulated = run(*generate, "--emulate", "nodes=2x2,intra=1GB/s:2us,inter=10MB/s:100us", "--backend", "local")
    passed(json.loads(emulated.stdout)["ids"] == tokens, "an emulated network changes times only")


def check_messages(model: pathlib.Path, ids: str, scratch: pathlib.Path) -> None:
    corrupt = scratch / "corrupt"
    shutil.copytree(model, corrupt)
    shutil.rmtree(corrupt / "training")  # whose manifest would have it that the file was edited
    weights = {key: value.clone() for key, value in load_file(corrupt / "model.safetensors").items()}
    name = "model.layers.1.mlp.experts.3.down_proj.weight"  # of the last rank
    weights[name][1, 2] = float("nan")
    save_file(weights, corrupt / "model.safetensors", {"format": "pt"})
    evaluate = ["eval", "--input", ids, "--model"]
    for backend in BACKENDS:
        launch = ["--ranks", "3", "--backend", backend]
        message = f"rank 2 of 3: {corrupt}/model.safetensors: tensor '{name}': not finite at [1, 2]"
        expect_message(2, message, *evaluate, str(corrupt), *launch)
        expect_message(2, "cannot read nowhere", *evaluate, "nowhere", *launch)
        nowhere = "rank 0 of 3: --logits /nowhere/logits: there is no folder /nowhere"
        expect_message(2, nowhere, *evaluate, str(model), *launch, "--logits", "/nowhere/logits")
        expect_message(1, "rank 0 of 3: cannot write", *evaluate, str(model), *launch, "--logits", str(scratch))
    expect_message(2, "--ranks -1: must be at least 1", *evaluate, str(model), "--ranks", "-1")
    several = ["inspect", "--model", str(model), "--input", ids]
    expect_message(2, "input_ids has shape [5, 11]: inspect takes one sequence", *several)
    many = ["generate", "--model", str(model), "--ids", "1,2", "--max-tokens", str(2**63 - 1)]
    expect_message(2, "more than the model's max_positions = 64", *many)
    expect_message(2, "--timeout 0: must be positive", *evaluate, str(model), "--timeout", "0")
    expect_message(2, "must be at most 31536000 s, a year", *evaluate, str(model), "--timeout", "1e10")
    expect_message(2, "--backend gloo: must be auto, local or mpi", *evaluate, str(model), "--backend", "gloo")
    expect_message(2, "network: intra: must be given", *evaluate, str(model), "--emulate", "nodes=3x1")
    if not MPIRUN:
        expect_message(2, "this build has no MPI", *evaluate, str(model), "--ranks", "2", "--backend", "mpi")


def start(*arguments: str, environment: dict[str, str] | None = None, prefix: tuple = ()) -> subprocess.Popen:
    variables = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"} | (environment or {})
    return subprocess.Popen(
        [*prefix, BINARY, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=variables
    )


def rank_processes(parent: subprocess.Popen, count: int) -> dict[int, int]:
    """Process ids by rank of the ranks that `parent` started, as soon as they compute."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        ranks = {}
        for process in pathlib.Path("/proc").glob("[0-9]*"):
            try:
                environment = (process / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            variables = dict(entry.split(b"=", 1) for entry in environment if b"=" in entry)
            rank = variables.get(b"OMPI_COMM_WORLD_RANK")  # mpirun has the starter's variables too
            started_here = variables.get(b"COLLEGIUM_STARTER") == f"/proc/{parent.pid}".encode()
            if rank and (started_here or parent_of(int(process.name)) == parent.pid):
                ranks[int(rank)] = int(process.name)
        if len(ranks) == count and all(cpu_seconds(pid) > 0.5 for pid in ranks.values()):
            return ranks
        time.sleep(0.05)
    raise AssertionError(f"{count} ranks did not start: {ranks}")


def parent_of(pid: int) -> int:
    try:
        return int(pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except OSError:
        return 0


def is_running(pid: int) -> bool:
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def cpu_seconds(pid: int) -> float:
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def check_lost_ranks(endless: list[str]) -> None:
    for name, kind, message in [
        ("killed", signal.SIGKILL, "rank 1 of 3 was ended by signal 9 (Killed)"),
        ("stopped", signal.SIGSTOP, "no answer within 3 s from rank 1"),
    ]:
        process = start(*endless, "--ranks", "3", "--backend", "mpi", "--timeout", "3")
        ranks = rank_processes(process, 3)
        began = time.monotonic()
        os.kill(ranks[1], kind)
        _, errors = process.communicate(timeout=30)
        lines = errors.strip().splitlines()
        passed(process.returncode == 1 and len(lines) == 1 and message in lines[0], f"{name}: {errors}")
        passed(name == "killed" or "of group '" in lines[0], f"{name}: no group in {errors}")
        passed(time.monotonic() - began < 10, f"{name}: took {time.monotonic() - began} s")
        while any(is_running(pid) for pid in ranks.values()):
            assert time.monotonic() - began < 15, f"{name}: ranks are left"
            time.sleep(0.05)


def check_lost_rank_of_mpirun(endless: list[str]) -> None:
    """Under the user's own mpirun too: one message, and it names the rank that has stopped."""
    process = start(*endless, "--timeout", "3", prefix=(*MPIRUN_COMMAND, "-n", "3"))
    ranks = rank_processes(process, 3)
    os.kill(ranks[1], signal.SIGSTOP)
    _, errors = process.communicate(timeout=30)
    lines = [line for line in errors.splitlines() if line.startswith("collegium: ")]
    passed(process.returncode != 0 and len(lines) == 1 and "no answer within 3 s from rank 1" in lines[0], errors)


def check_threads(endless: list[str]) -> None:
    """Where there are enough cores, ranks compute on cores of their own."""
    cores = sorted(os.sched_getaffinity(0))

    def busy_cores(pid: int) -> list[set[int]]:
        tasks = [task for task in pathlib.Path(f"/proc/{pid}/task").iterdir() if task.is_dir()]
        busy = [task for task in tasks if cpu_seconds_of_task(task) > 0.5]
        return [os.sched_getaffinity(int(task.name)) for task in busy if int(task.name) != pid or len(busy) == 1]

    bound = {"OMP_PROC_BIND": "close"}  # OpenMP has bound the first thread to one core before main()
    small = ("bench", "layer", "--tokens", "64", "--hidden", "32", "--ffn", "32", "--experts", "4", "--top-k", "2")
    alone, _ = start(*small, "--seconds", "0.01", "--json", environment=bound).communicate()
    passed(json.loads(alone)["threads_per_rank"] == len(cores), f"{bound}: {alone}")
    unbound = start(*endless, "--ranks", "2", "--backend", "local", environment={"OMP_PROC_BIND": "false"})
    while cpu_seconds(unbound.pid) < 2:
        time.sleep(0.05)
    passed(all(s == set(cores) for s in busy_cores(unbound.pid)), "OMP_PROC_BIND=false: threads are bound")
    unbound.kill()
    unbound.communicate()
    for backend, environment in itertools.product(BACKENDS, ({}, bound)):
        process = start(*endless, "--ranks", "2", "--backend", backend, environment=environment)
        if backend == "mpi":
            ranks = rank_processes(process, 2).values()
            while min(cpu_seconds(pid) for pid in ranks) < 3:
                time.sleep(0.05)
            sets = [busy_cores(pid) for pid in ranks]
            sets = [set.union(*cores_of_rank) for cores_of_rank in sets if cores_of_rank]
        else:
            while cpu_seconds(process.pid) < 3:
                time.sleep(0.05)
            sets = busy_cores(process.pid)
        process.kill()
        process.communicate()
        if len(cores) < 2:
            continue
        passed(len(sets) >= 2, f"{backend}, {environment}: busy threads run on {sets}")
        first = [s for s in sets if s <= set(cores[: len(cores) // 2])]
        second = [s for s in sets if s <= set(cores[len(cores) // 2 :])]
        passed(first and second, f"{backend}, {environment}: busy threads run on {sets} of {cores}")


def cpu_seconds_of_task(task: pathlib.Path) -> float:
    fields = (task / "stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def check_stop_signals(run_file: pathlib.Path) -> None:
    """The first signal ends a training run with a checkpoint, the second at once."""
    folder = run_file.parent / "stopped"
    arguments = ["train", str(run_file), "--ranks", "2", "--json", "--fresh", "--set", "train.steps=1000000"]
    arguments += ["--set", f"run_folder={folder}", "--set", "checkpoint.every_steps=0"]
    for backend, signals in [(b, n) for b in BACKENDS for n in (1, 2)]:
        shutil.rmtree(folder, ignore_errors=True)
        process = start(*arguments, "--backend", backend)
        metrics = folder / "metrics.jsonl"
        while not (metrics.exists() and metrics.stat().st_size > 0):
            assert process.poll() is None, "the run ended by itself"
            time.sleep(0.02)
        second = subprocess.run([BINARY, *arguments], capture_output=True, text=True, check=False, timeout=60)
        refusal = f"{folder}: another process is writing there"
        passed(second.returncode == 2 and refusal in second.stderr, f"{backend}: {second.stderr}")
        for _ in range(signals):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.01)
        output, errors = process.communicate(timeout=30)
        if signals == 1:
            passed(process.returncode == 0, f"{backend}: exit code {process.returncode}: {errors}")
            passed(pathlib.Path(json.loads(output)["checkpoint"]).exists(), f"{backend}: no checkpoint")
        else:
            passed(process.returncode != 0, f"{backend}: a second signal ends the run")


def check_launchers(model: pathlib.Path, ids: str) -> None:
    evaluate = ["eval", "--model", str(model), "--input", ids, "--json"]
    foreign = {"PMI_SIZE": "4", "PMI_RANK": "0"}
    message = run(*evaluate, code=2, env=foreign).stderr
    expected = "PMI_SIZE = 4, but the MPI world has 1 rank" if MPIRUN else "this build has no MPI"
    passed(expected in message, message)
    message = run(*evaluate, "--ranks", "2", code=2, env=foreign).stderr
    passed("--ranks 2: the launcher has started 4 (PMI_SIZE = 4)" in message, message)
    if not MPIRUN:
        return
    reference = json.loads(run(*evaluate).stdout)["loss"]
    for options in ([], ["--ranks", "3"], ["--backend", "mpi"]):
        output = run(*evaluate, *options, prefix=(*MPIRUN_COMMAND, "-n", "3")).stdout
        passed(abs(json.loads(output)["loss"] - reference) < 1e-5, output)  # float32
    for count, options, code, message in [
        ("3", ["--ranks", "2"], 2, "--ranks 2: the launcher has started 3 (OMPI_COMM_WORLD_SIZE = 3)"),
        ("1", ["--ranks", "2"], 2, "--ranks 2: the launcher has started 1 (OMPI_COMM_WORLD_SIZE = 1)"),
        ("2", ["--backend", "local"], 2, "--backend local: the launcher has started 2 ranks as processes"),
        ("3", ["--logits", "/nowhere/logits"], 2, "rank 0 of 3: --logits /nowhere/logits: there is no folder"),
        ("3", ["--no-such-option"], 2, "--no-such-option"),
    ]:
        done = run(*evaluate, *options, code=code, prefix=(*MPIRUN_COMMAND, "-n", count))
        passed(done.stderr.count(message) == 1, f"{options}: not one message: {done.stderr}")


def check_separate_folders(run_file: pathlib.Path, scratch: pathlib.Path) -> None:
    """Ranks without a shared file system: the checkpoint is where rank 0 is, and rank 1 has none."""
    arguments = ["train", str(run_file), "--set", "run_folder=run"]
    here, there = scratch / "here", scratch / "there"
    here.mkdir()
    there.mkdir()
    done = subprocess.run([BINARY, *arguments], cwd=here, capture_output=True, text=True, check=False, timeout=60)
    passed(done.returncode == 0, done.stderr)
    rank = [BINARY, *arguments]
    each = ["-n", "1", "--wdir", str(here), *rank, ":", "-n", "1", "--wdir", str(there), *rank]
    done = subprocess.run([*MPIRUN_COMMAND, *each], capture_output=True, text=True, check=False, timeout=60)
    message = 'run_folder = run: rank 1 finds "no checkpoint" there, rank 0 "run/step-00000006"'
    passed(done.returncode == 2 and done.stderr.count(message) == 1, f"{done.returncode}: {done.stderr}")
    passed(not (there / "run").exists(), "a refused rank wrote something")


def main() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        run_file = prepare(BINARY, folder, 6)
        trained = collegium(BINARY, "train", str(run_file), "--json")
        passed(trained.returncode == 0, trained.stderr)
        model = pathlib.Path(json.loads(trained.stdout)["checkpoint"])
        ids = str(folder / "ids.safetensors")
        save_file({"input_ids": torch.arange(55).view(5, 11) % 23}, ids)
        endless = ["generate", "--model", str(without_end(model, folder / "endless")), "--ids", "1,2,3"]
        endless += ["--max-tokens", "1000000"]

        check_eval(with_balance_loss(model, folder / "balanced"), ids, folder)
        check_text_verbs(model, ids, str(folder / "data"))
        check_messages(model, ids, folder)
        check_threads(endless)
        check_stop_signals(run_file)
        check_launchers(model, ids)
        if MPIRUN:
            check_lost_ranks(endless)
            check_lost_rank_of_mpirun(endless)
            check_separate_folders(run_file, folder)
    print(f"{CHECKS} passed, 0 failed")


if __name__ == "__main__":
    main()
