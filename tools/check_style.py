#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Limits that keep the code readable: licence line, #pragma once, file and function length, nothing left open."""

import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
OPEN_END = re.compile(r"\b(TODO|FIXME|XXX)\b")
MACHINE_PATH = re.compile(r"(?<![\w.])/(work|home|root|opt)/\w")


def long_functions(lines: list[str]) -> list[tuple[int, int]]:
    """Blocks that open at the end of an unindented (or class-level) line and close at the same indentation."""
    found = []
    for i, line in enumerate(lines):
        if not line.rstrip().endswith("{") or line.lstrip().startswith(("namespace", "class", "struct", "enum", "}")):
            continue
        first = i  # of a signature, whose other lines are indented further; a lambda's is within its function's
        while "](" not in line and first > 0 and not re.search(r"([;{}:>]|//.*|^)$", lines[first - 1].rstrip()):
            first -= 1
        indent = len(lines[first]) - len(lines[first].lstrip())
        if indent not in (0, 2):
            continue
        for j in range(i + 1, len(lines)):
            if lines[j].startswith(" " * indent + "}"):
                if j - i > MAX_FUNCTION_LINES:
                    found.append((i + 1, j - i))
                break
    return found


def check(path: pathlib.Path) -> list[str]:
    text = path.read_text()
    lines = text.splitlines()
    name = path.relative_to(ROOT)
    errors = []
    if path.suffix in (
        ".h",
        ".cpp",
        ".py",
    ) and "SPDX-License-Identifier" not in "\n".join(lines[:3]):
        errors.append(f"{name}: no SPDX licence line")
    if path.suffix == ".h" and "#pragma once" not in text:
        errors.append(f"{name}: no #pragma once")
    if path.suffix in (".h", ".cpp", ".py") and len(lines) > MAX_FILE_LINES:
        errors.append(f"{name}: {len(lines)} lines, at most {MAX_FILE_LINES}")
    if path.suffix == ".cpp":
        for line, length in long_functions(lines):
            errors.append(f"{name}:{line}: a block of {length} lines, at most {MAX_FUNCTION_LINES}")
    for number, line in enumerate(lines, 1):
        if path.name != "check_style.py" and OPEN_END.search(line):
            errors.append(f"{name}:{number}: something is left open")
        if path.name != "check_style.py" and MACHINE_PATH.search(line):
            errors.append(f"{name}:{number}: a path of one machine")
    return errors


def main() -> int:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    paths = [ROOT / name for name in listed if (ROOT / name).is_file()]
    errors = [error for path in paths for error in check(path)]
    print("\n".join(errors) if errors else f"style: {len(paths)} files are in order")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
