#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Splits a table of published runs into validation/<source>/runs.csv, one folder per repository that published them.

Every row keeps all its columns, the document and commit it was read from among them. A second call writes the same
files.
"""

import argparse
import csv
import pathlib
import re
import sys


def folder_name(source: str) -> str:
    repository = re.split(r"[@ ]", source.strip(), maxsplit=1)[0].rstrip(":")
    return re.sub(r"[^A-Za-z0-9]+", "-", repository).strip("-").lower()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=pathlib.Path, help="CSV with a column `source`")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("validation"))
    arguments = parser.parse_args()
    with arguments.table.open(newline="") as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or []
        if "source" not in columns:
            sys.exit(f"{arguments.table}: no column `source`; its columns are {', '.join(columns)}")
        by_folder: dict[str, list[dict]] = {}
        for row in reader:
            by_folder.setdefault(folder_name(row["source"]), []).append(row)
    for name, rows in sorted(by_folder.items()):
        folder = arguments.out / name
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "runs.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        print(f"{folder}: {len(rows)} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
