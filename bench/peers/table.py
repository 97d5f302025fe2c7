# SPDX-License-Identifier: Apache-2.0
"""Medians, quartiles and ratios of what was measured, as Markdown.

A ratio is taken repetition by repetition, between neighbours in time, and then summed up like the figures: a machine
that slows down for a while slows both.
"""

import statistics
from collections.abc import Callable

from shapes import DTYPES, LAYERS, STEPS
from systems import EP_DISPATCHERS, LAYER_SYSTEMS, STEP_SYSTEMS, System

GIB = 2.0**30
Series = dict[int, float]  # by repetition


class Cell:
    """What was measured of one shape and dtype."""

    def __init__(self, records: list[dict], statistic: str):
        self.records = [record for record in records if "result" in record]
        self.failed = {record["system"] for record in records if "error" in record}
        self.statistic = statistic

    def series(self, system: str, value: Callable[[dict], float]) -> Series:
        return {r["repetition"]: value(r["result"]) for r in self.records if r["system"] == system}

    def seconds(self, system: str) -> Series:
        """For all of the work: where slots were dropped, what the kept ones took is scaled up."""
        key = f"seconds_{self.statistic}"
        return self.series(system, lambda result: result[key] / (1.0 - result.get("dropped", 0.0)))

    def best(self, peer: str) -> Series:
        """The peer's fastest way, by the median of its repetitions; one that failed in any is left out."""
        systems = {record["system"] for record in self.records if record["system"].split("/")[0] == peer} - self.failed
        every = [self.seconds(system) for system in systems]
        return min(every, key=lambda series: statistics.median(series.values()), default={})


def ratio(above: Series, below: Series) -> Series:
    return {repetition: above[repetition] / below[repetition] for repetition in above.keys() & below.keys()}


def show(series: Series, digits: int = 2) -> str:
    """median (lower quartile - upper quartile)"""
    values = list(series.values())
    if not values:
        return "-"
    median = f"{statistics.median(values):.{digits}f}"
    if len(values) == 1:
        return median
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{median} ({low:.{digits}f}-{high:.{digits}f})"


def figure(cell: Cell, system: System, scale: float, digits: int) -> str:
    if system.key in cell.failed:
        return "failed"
    text = show({r: scale / s for r, s in cell.seconds(system.key).items()}, digits)
    dropped = cell.series(system.key, lambda result: result.get("dropped", 0.0))
    if any(dropped.values()):
        text += f", drops {100.0 * statistics.median(dropped.values()):.1f} %"
    return text


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def columns(records: list[dict], work: str, shapes: dict, statistic: str) -> list[tuple[str, str, Cell]]:
    found = []
    for dtype in DTYPES:
        for name in shapes:
            own = [r for r in records if (r["work"], r["dtype"], r["shape"]) == (work, dtype, name)]
            if own:
                found.append((dtype, name, Cell(own, statistic)))
    return found


def layer_table(records: list[dict], statistic: str) -> str:
    cells = columns(records, "layer", LAYERS, statistic)
    if not cells:
        return ""
    used = {record["system"] for record in records if record["work"] == "layer"}
    rows = [
        [system.title, *(figure(cell, system, LAYERS[name].flops / 1e9, 0) for _, name, cell in cells)]
        for system in LAYER_SYSTEMS
        if system.key in used
    ]

    def row(title: str, value: Callable[[Cell], Series]) -> None:
        shown = [show(value(cell)) for _, _, cell in cells]
        if any(text != "-" for text in shown):
            rows.append([f"**{title}**", *shown])

    # The floor is always the least time of its runs; so is what it is compared with.
    floors = [(name, cell.series("collegium", lambda result: result["gemm_floor_seconds"])) for _, name, cell in cells]
    rows.append(
        [
            "GEMM floor, same run",
            *(show({r: LAYERS[name].flops / 1e9 / s for r, s in floor.items()}, 0) for name, floor in floors),
        ]
    )
    row("against the better transformers path", lambda c: ratio(c.best("transformers"), c.seconds("collegium")))
    row("against DeepSpeed-MoE's best", lambda c: ratio(c.best("deepspeed"), c.seconds("collegium")))
    row("against torchtitan", lambda c: ratio(c.best("torchtitan"), c.seconds("collegium")))
    row("of the GEMM floor", lambda c: c.series("collegium", lambda result: result["fraction_of_gemm_floor"]))
    for d in EP_DISPATCHERS:
        row(
            f"EP=2 over MPI, {d}, of one process",
            lambda c, d=d: ratio(c.seconds("collegium/W0"), c.seconds(f"collegium/EP/{d}")),
        )
    row("half of all tokens to one expert: time", lambda c: ratio(c.seconds("collegium/W1"), c.seconds("collegium/W0")))
    header = ["GFLOP/s of useful work", *(f"{dtype} {LAYERS[name].name}" for dtype, name, _ in cells)]
    return "One MoE layer, forward and backward\n\n" + markdown(header, rows)


def step_table(records: list[dict], statistic: str) -> str:
    cells = columns(records, "step", STEPS, statistic)
    if not cells:
        return ""
    used = {record["system"] for record in records if record["work"] == "step"}
    systems = [system for system in STEP_SYSTEMS if system.key in used]
    rows = [
        [f"{system.title}, tokens/s", *(figure(cell, system, STEPS[name].tokens, 0) for _, name, cell in cells)]
        for system in systems
    ]

    def memory(cell: Cell, system: str) -> Series:
        return cell.series(system, lambda result: result["peak_rss_bytes"] / GIB)

    def least_memory(cell: Cell) -> Series:
        every = [memory(cell, system.key) for system in systems if system.peer == "transformers"]
        return min(filter(None, every), key=lambda series: statistics.median(series.values()), default={})

    for system in systems:
        rows.append([f"{system.title}, peak memory, GiB", *(show(memory(cell, system.key)) for _, _, cell in cells)])
    rows.append(
        [
            "**against the better transformers path**",
            *(show(ratio(cell.best("transformers"), cell.seconds("collegium"))) for _, _, cell in cells),
        ]
    )
    rows.append(
        [
            "**peak memory, of transformers' lesser**",
            *(show(ratio(memory(cell, "collegium"), least_memory(cell))) for _, _, cell in cells),
        ]
    )
    header = ["", *(f"{dtype} {name}, {STEPS[name].parameters / 1e6:.0f} M" for dtype, name, _ in cells)]
    return "The whole training step\n\n" + markdown(header, rows)


def tables(session: dict, statistic: str) -> str:
    repetitions = 1 + max((record["repetition"] for record in session["records"]), default=-1)
    facts = "; ".join(f"{key} {value}" for key, value in session["facts"].items())
    parts = [
        f"{repetitions} interleaved repetitions, medians and quartiles; {facts}",
        layer_table(session["records"], statistic),
        step_table(session["records"], statistic),
    ]
    return "\n\n".join(filter(None, parts))
