#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Fails when a module includes one that is not below it (docs/architecture.md), or torch where there must be none."""

import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
LEVELS = {
    "base": 0,
    "mesh": 1,
    "plan": 2,
    "comm": 3,
    "ops": 4,
    "moe": 5,
    "model": 6,
    "parallel": 7,
    "optim": 8,
    "data": 8,
    "train": 9,
    "report": 10,
    "cli": 11,
}
WITHOUT_TORCH = {"base", "mesh", "plan", "report", "data"}
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.MULTILINE)


def main() -> int:
    errors = []
    files = [p for p in (ROOT / "collegium").rglob("*") if p.suffix in (".h", ".cpp")]
    for path in files:
        module = path.relative_to(ROOT / "collegium").parts[0]
        if module not in LEVELS:
            errors.append(f"{path.relative_to(ROOT)}: unknown module {module}")
            continue
        for quote, include in INCLUDE.findall(path.read_text()):
            parts = include.split("/")
            if quote == '"' and parts[0] != "collegium":
                errors.append(f"{path.relative_to(ROOT)}: {include}: write the path from the root, collegium/...")
            if parts[0] == "collegium" and parts[1] != module and LEVELS[parts[1]] >= LEVELS[module]:
                errors.append(f"{path.relative_to(ROOT)}: {module} must not use {parts[1]}")
            if parts[0] in ("ATen", "torch", "c10") and module in WITHOUT_TORCH:
                errors.append(f"{path.relative_to(ROOT)}: {module} has no torch, but includes {include}")
    print("\n".join(errors) if errors else f"layers: {len(files)} files are in order")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
