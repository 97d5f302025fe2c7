#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Two network namespaces stand for two machines: mpirun starts a rank in each, and they talk over TCP."""

import contextlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import torch
from safetensors.torch import load_file, save_file
from small_run import collegium, prepare

BINARY, MPIRUN = sys.argv[1:3]
HOSTS = {"10.77.0.1": f"collegium-a{os.getpid()}", "10.77.0.2": f"collegium-b{os.getpid()}"}
SKIPPED = 77  # what CMake counts as skipped
BOUND = 1e-11  # float64: the order of summation alone differs
CHECKS = 0

# What mpirun calls in place of ssh: HOST COMMAND. A machine has its own network and its own name.
AGENT = """#!/bin/sh
case "$1" in {cases} esac
shift
exec ip netns exec "$namespace" unshare --uts sh -c "hostname $namespace; $*"
"""


def passed(condition: bool, what: object) -> None:
    global CHECKS
    assert condition, what
    CHECKS += 1


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True).stdout


@contextlib.contextmanager
def two_machines() -> Iterator[None]:
    """Two namespaces and a cable between them."""
    first, second = HOSTS.values()
    try:
        for namespace in HOSTS.values():
            ip("netns", "add", namespace)
        ip("link", "add", "cable", "netns", first, "type", "veth", "peer", "name", "cable", "netns", second)
        for address, namespace in HOSTS.items():
            ip("-n", namespace, "address", "add", f"{address}/24", "dev", "cable")
            for device in ("lo", "cable"):
                ip("-n", namespace, "link", "set", device, "up")
        yield
    finally:
        for namespace in HOSTS.values():
            subprocess.run(["ip", "netns", "delete", namespace], capture_output=True, check=False)


def why_not() -> str:
    if os.geteuid() != 0:
        return "needs root"
    for program in ("ip", "unshare", "hostname"):
        if not shutil.which(program):
            return f"needs the program {program}"
    try:
        with two_machines():
            return ""
    except subprocess.CalledProcessError as error:
        return f"no network namespaces here: {' '.join(error.cmd)}: {error.stderr.strip()}"


def on_both(folder: pathlib.Path, *arguments: str) -> list[str]:
    """The command that runs one rank on each machine, called on the first."""
    agent = folder / "agent.sh"
    cases = " ".join(f"{address}) namespace={namespace};;" for address, namespace in HOSTS.items())
    agent.write_text(AGENT.format(cases=cases))
    agent.chmod(0o755)
    hostfile = folder / "hosts"
    hostfile.write_text("".join(f"{address} slots=1\n" for address in HOSTS))
    first = next(iter(HOSTS.values()))
    mpirun = [MPIRUN, "--allow-run-as-root", "--hostfile", str(hostfile), "--bind-to", "none", "-n", "2"]
    mpirun += ["--prtemca", "plm", "ssh", "--prtemca", "plm_ssh_agent", str(agent)]
    mpirun += ["--mca", "pml", "ob1", "--mca", "btl", "tcp,self"]
    inside = ["ip", "netns", "exec", first, "unshare", "--uts", "sh", "-c", 'hostname "$0"; exec "$@"', first]
    return [*inside, *mpirun, BINARY, *arguments]


def run_on_both(folder: pathlib.Path, *arguments: str) -> str:
    done = subprocess.run(on_both(folder, *arguments), capture_output=True, text=True, timeout=90, check=False)
    passed(done.returncode == 0, f"{arguments}: exit code {done.returncode}: {done.stderr}")
    return done.stdout


def received_bytes() -> int:
    statistics = json.loads(ip("-n", next(iter(HOSTS.values())), "-s", "-j", "link", "show", "cable"))
    return statistics[0]["stats64"]["rx"]["bytes"]


def records(folder: pathlib.Path) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] != "planner"]


def check_train(folder: pathlib.Path, run_file: pathlib.Path) -> pathlib.Path:
    train = ["train", str(run_file), "--json", "--set", "train.dtype=float64", "--set", "parallel.ep=2"]
    train += ["--set", "parallel.dispatcher.kind=two_level"]
    alone = [*train[:5], "--set", f"run_folder={folder}/alone"]
    done = collegium(BINARY, *alone)
    passed(done.returncode == 0, done.stderr)
    before = received_bytes()
    summary = json.loads(run_on_both(folder, *train, "--set", f"run_folder={folder}/both"))
    received = received_bytes() - before
    losses = {(r["kind"], r["step"]): r["loss"] for r in records(folder / "alone")}
    between_nodes = 0
    for record in records(folder / "both"):
        expected = losses.pop((record["kind"], record["step"]))
        passed(abs(record["loss"] - expected) <= BOUND * expected, f"{record['kind']} {record['step']}: another loss")
        between_nodes += record.get("communication", {}).get("bytes_between_nodes", 0)
    passed(not losses, f"missing: {losses}")
    passed(between_nodes > 0, "the ledger counts nothing between nodes")
    # What rank 0 sent is about what it received; TCP and mpirun add to it.
    passed(received > between_nodes, f"{received} bytes came through the cable, {between_nodes} were counted")
    return pathlib.Path(summary["checkpoint"])


def check_eval(folder: pathlib.Path, model: pathlib.Path) -> None:
    ids = folder / "ids.safetensors"
    save_file({"input_ids": torch.arange(55).view(5, 11) % 23}, ids)
    evaluate = ["eval", "--model", str(model), "--input", str(ids), "--dtype", "float64", "--json", "--grads"]
    done = collegium(BINARY, *evaluate, f"{folder}/alone.safetensors")
    passed(done.returncode == 0, done.stderr)
    result = json.loads(run_on_both(folder, *evaluate, f"{folder}/both.safetensors", "--ranks", "2"))
    expected = json.loads(done.stdout)["loss"]
    passed(abs(result["loss"] - expected) <= BOUND * expected, "another loss")
    gradients = load_file(folder / "both.safetensors")
    for name, reference in load_file(folder / "alone.safetensors").items():
        difference = (gradients[name] - reference).norm() / max(reference.norm(), 1e-12)
        passed(difference <= BOUND, f"the gradient of {name} differs by {difference}")


def processes_of(folder: pathlib.Path) -> list[int]:
    """The ranks: the program with this test's files among its arguments."""
    found = []
    for process in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            arguments = (process / "cmdline").read_bytes().split(b"\0")
            if arguments[0] == BINARY.encode() and any(str(folder).encode() in a for a in arguments):
                found.append(int(process.name))
    return found


def check_broken_cable(folder: pathlib.Path, model: pathlib.Path) -> None:
    """Both ranks end in time and say who is missing. mpirun itself waits for the lost machine's daemon."""
    endless = folder / "endless"
    shutil.copytree(model, endless)
    config = json.loads((endless / "config.json").read_text())
    config["max_position_embeddings"] = 10**7
    (endless / "config.json").write_text(json.dumps(config))
    command = on_both(folder, "generate", "--model", str(endless), "--ids", "1", "--max-tokens", "1000000")
    report = folder / "report"
    with report.open("w") as file:
        process = subprocess.Popen([*command, "--timeout", "3"], stdout=file, stderr=file, start_new_session=True)
        try:
            before = received_bytes()
            while received_bytes() - before < 500_000:
                assert process.poll() is None, "the ranks ended by themselves"
                time.sleep(0.1)
            ip("-n", next(iter(HOSTS.values())), "link", "set", "cable", "down")
            began = time.monotonic()
            while processes_of(folder) and time.monotonic() - began < 15:
                time.sleep(0.1)
            passed(not processes_of(folder), f"ranks are left: {report.read_text()}")
        finally:
            end_machines(process)
    text = report.read_text(errors="replace")
    passed("no answer within 3 s from rank 1" in text, f"nobody names the missing rank: {text}")


def end_machines(process: subprocess.Popen) -> None:
    """Ends mpirun and everything that runs in the two namespaces."""
    process.kill()
    process.wait()
    for namespace in HOSTS.values():
        for pid in ip("netns", "pids", namespace).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), 9)


def main() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    reason = why_not()
    if reason:
        print(f"skipped: {reason}")
        sys.exit(SKIPPED)
    with tempfile.TemporaryDirectory() as temporary, two_machines():
        folder = pathlib.Path(temporary)
        model = check_train(folder, prepare(BINARY, folder, 5))
        check_eval(folder, model)
        check_broken_cable(folder, model)
    print(f"{CHECKS} passed, 0 failed")


if __name__ == "__main__":
    main()
