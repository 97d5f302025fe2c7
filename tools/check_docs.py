#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Documentation that can be checked: public functions are documented, references exist, links lead somewhere."""

import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
REFERENCE = re.compile(r"\[([A-Z][A-Za-z]+\d{0,4}[a-z]?), (?:Sec|Eq|Eqs|Alg|Table|Fig|Appendix)")
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


SECTION = r"(?:What|Math|Shape|Dtype|Comm|Order|Throws|Ref|Returns) {2,}"


def broken_sections(path: pathlib.Path) -> list[str]:
    """A comment of sections: each begins a line of its own, and its other lines are indented below its text."""
    errors = []
    inside = False
    for number, line in enumerate(path.read_text().splitlines(), 1):
        comment = re.match(r"^ *///(?!<) ?(.*)$", line)
        begins = bool(comment and re.match(SECTION, comment[1]))
        if comment and re.search(r"\S " + SECTION + r"\S", comment[1]):
            errors.append(f"{path.relative_to(ROOT)}:{number}: a section begins in the middle of a line")
        elif comment and inside and not begins and not comment[1].startswith("  "):
            errors.append(f"{path.relative_to(ROOT)}:{number}: a section's line is not indented below its text")
        inside = bool(comment) and (inside or begins)
    return errors


def undocumented(path: pathlib.Path) -> list[str]:
    text = path.read_text()
    errors = []
    previous_documented = False
    text = re.sub(r"^namespace internal \{.*?^\}  // namespace internal$", "", text, flags=re.MULTILINE | re.DOTALL)
    lines = text.splitlines()
    for i, line in enumerate(lines):
        starts = re.match(r"^[A-Za-z_0-9:<>,\* &\[\]]+[ &\*](\w+)\(", line)
        is_declaration = starts and not line.startswith((" ", "#", "}", "template", "class", "struct", "using"))
        if is_declaration and "describe" not in line and "operator" not in line:
            first = i - 1 if lines[i - 1].startswith("template") else i
            above = lines[first - 1].strip() if first else ""
            documented = above.startswith("///") or "///<" in line
            # A function right below a documented one shares its comment.
            if not documented and not (previous_documented and (above.endswith(";") or above == "")):
                errors.append(f"{path.relative_to(ROOT)}:{i + 1}: {starts.group(1)}() has no /// comment")
            previous_documented = True
        elif line.strip() == "":
            previous_documented = False
    return errors


def main() -> int:
    errors = []
    headers = [*ROOT.glob("collegium/**/*.h")]
    known = (ROOT / "docs/references.md").read_text()
    for path in headers:
        errors += broken_sections(path)
        if "cli" not in path.parts:
            errors += undocumented(path)
    for path in [*headers, *ROOT.glob("collegium/**/*.cpp")]:
        for key in REFERENCE.findall(path.read_text()):
            if f"**{key}**" not in known:
                errors.append(f"{path.relative_to(ROOT)}: reference [{key}] is not in docs/references.md")
    for path in [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("collegium/**/*.md"),
    ]:
        for target in LINK.findall(path.read_text()):
            if not (path.parent / target).exists():
                errors.append(f"{path.relative_to(ROOT)}: the link to {target} leads nowhere")
    print("\n".join(errors) if errors else f"docs: {len(headers)} headers are documented, references and links exist")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
