#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Runs clang-tidy on the project's sources, one per core, and remembers which were clean.

The compile commands are g++'s: its precompiled header means nothing to clang, which reads the headers in it instead. A
file is checked again when it, any project header, those headers, .clang-tidy or the pinned tool version changed.
"""

import concurrent.futures
import hashlib
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
BUILD = ROOT / "build-each"  # of its own commands: elsewhere sources are compiled in batches
CACHE = BUILD / "tidy"


def digest(paths: list[pathlib.Path]) -> str:
    result = hashlib.sha256()
    for path in sorted(paths):
        result.update(path.read_bytes())
    return result.hexdigest()


def clang_arguments(command: str) -> list[str]:
    words = shlex.split(command)[1:]
    kept = []
    header = []
    skip = 0
    for i, word in enumerate(words):
        if skip:
            skip -= 1
        elif word == "-include" and words[i + 1].endswith("cmake_pch.hxx"):
            # Sources rely on the headers that are precompiled for them; clang reads those themselves.
            for name in re.findall(r"#include <(.+)>", pathlib.Path(words[i + 1]).read_text()):
                header += ["-include", name]
            skip = 1
        elif word in ("-MD", "-Winvalid-pch", "-Werror"):
            continue
        elif word in ("-MT", "-MF", "-o"):
            skip = 1
        else:
            kept.append(word)
    # libtorch relies on gcc's omp.h; clang's own headers still come first.
    gcc = subprocess.run(["g++", "-print-file-name=include"], capture_output=True, text=True, check=True).stdout.strip()
    return [word for word in kept if word != "-c"] + header + ["-idirafter", gcc, "-Wno-everything"]


def main() -> int:
    commands = json.loads((BUILD / "compile_commands.json").read_text())
    shared = [
        *ROOT.glob("collegium/**/*.h"),
        *ROOT.glob("tests/**/*.h"),
        ROOT / ".clang-tidy",
        ROOT / "cmake" / "Modules.cmake",
        ROOT / "requirements.txt",
    ]
    headers = digest(shared)
    CACHE.mkdir(parents=True, exist_ok=True)
    work = []
    for entry in commands:
        source = pathlib.Path(entry["file"])
        if BUILD in source.parents or "CMakeFiles" in source.parts:
            continue
        mark = CACHE / hashlib.sha256((headers + digest([source]) + str(source)).encode()).hexdigest()
        if not mark.exists():
            work.append((source, clang_arguments(entry["command"]), mark))

    def check(item: tuple) -> tuple[pathlib.Path, int, str]:
        source, arguments, mark = item
        words = [w for w in arguments if w != str(source)]
        command = [
            str(ROOT / ".venv/bin/clang-tidy"),
            "--quiet",
            str(source),
            "--",
            *words,
        ]
        done = subprocess.run(command, capture_output=True, text=True, cwd=BUILD, check=False)
        if done.returncode == 0:
            mark.touch()
        return (
            source,
            done.returncode,
            done.stdout + (done.stderr if done.returncode else ""),
        )

    failed = 0
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for source, code, output in pool.map(check, work):
            if code:
                failed += 1
                print(f"{source.relative_to(ROOT)}\n{output}", flush=True)
    print(f"clang-tidy: {len(work)} files checked, {failed} with findings")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
