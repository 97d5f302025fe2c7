# SPDX-License-Identifier: Apache-2.0
"""The peers' own virtual environment: .venv-peers, which shares torch with .venv, so that all run the same kernels."""

import hashlib
import os
import pathlib
import subprocess

ROOT = pathlib.Path(__file__).resolve().parents[2]
REQUIREMENTS = pathlib.Path(__file__).with_name("requirements.txt")
PYTHON = ROOT / ".venv/bin/python"
PEERS_PYTHON = ROOT / ".venv-peers/bin/python"
WITHOUT_DEPENDENCIES = "# without dependencies: "


def pinned_version(package: str) -> str:
    """Of a peer: what make_environment() installs."""
    lines = (line.removeprefix(WITHOUT_DEPENDENCIES) for line in REQUIREMENTS.read_text().splitlines())
    return next(line.split("==")[1] for line in lines if line.startswith(f"{package}=="))


def install(*arguments: str) -> None:
    # No operator is compiled at installation: those that DeepSpeed-MoE runs on a CPU are torch's.
    environment = os.environ | {"DS_BUILD_OPS": "0", "DS_ACCELERATOR": "cpu"}
    subprocess.run([PEERS_PYTHON, "-m", "pip", "install", "--quiet", *arguments], check=True, env=environment)


def make_environment() -> None:
    """Makes .venv-peers or brings it up to date; a second call does nothing."""
    stamp = ROOT / ".venv-peers/setup.stamp"
    wanted = hashlib.sha256((ROOT / "requirements.txt").read_bytes() + REQUIREMENTS.read_bytes()).hexdigest()
    if stamp.exists() and stamp.read_text() == wanted:
        return
    print("making .venv-peers", flush=True)
    # With .venv's own Python, whoever runs this.
    subprocess.run([PYTHON, "-m", "venv", "--clear", "--symlinks", str(ROOT / ".venv-peers")], check=True)
    where = "import sysconfig; print(sysconfig.get_path('purelib', vars={'base': '', 'platbase': ''}).lstrip('/'))"
    name = subprocess.check_output([PYTHON, "-c", where], text=True).strip()
    (ROOT / ".venv-peers" / name / "shared.pth").write_text(f"{ROOT / '.venv' / name}\n")
    alone = [
        line.removeprefix(WITHOUT_DEPENDENCIES)
        for line in REQUIREMENTS.read_text().splitlines()
        if line.startswith(WITHOUT_DEPENDENCIES)
    ]
    install("-r", str(REQUIREMENTS))
    install("--no-deps", *alone)
    stamp.write_text(wanted)
