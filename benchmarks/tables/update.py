"""One update of one average: fastswa, torch's class and the quickest other way, by network."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.pictures.measurements import NAMES, Measurement, disturbed, number
from benchmarks.providers import CEILING, OURS, TORCH
from benchmarks.tables.files import File, gpus, link, rows_of
from benchmarks.tables.markdown import (
    commands,
    figure,
    hardware,
    paragraph,
    plain,
    ratio,
    scatter,
    table,
    together,
)

PLANS = {"fp32": "", "mixed": ", bfloat16 weights, float32 average"}
MIXED = ("gpt2",)
"""The networks that are shown with bfloat16 weights too."""
HEADINGS = (
    "tensors of",
    "fastswa",
    "torch's AveragedModel",
    "quickest other",
    "times torch's speed",
    "times the other's",
)


def update(files: Sequence[File]) -> str:
    """The table of a device after another.

    Args:
        files: of a folder.
    """
    parts = []
    for device in ("cpu", *gpus(files)):
        rows = [row for row in rows_of(files, "update", device) if row.get("plan") in PLANS]
        if rows:
            parts.append(_on(rows, link(files, "update", device)))
    if not gpus(files):
        parts.append("On a GPU: not measured yet.")
    return "\n\n".join(parts)


def _on(rows: Sequence[Measurement], source: str) -> str:
    lines: list[tuple[str, ...]] = []
    quicker: dict[str, list[str]] = {}
    for case in dict.fromkeys(row["case"] for row in rows):
        for plan, words in PLANS.items():
            found = {row["provider"]: row for row in rows if (row["case"], row["plan"]) == (case, plan)}
            if OURS not in found or (plan == "mixed" and case not in MIXED):
                continue
            other = _quickest(found)
            name = NAMES.get(case, case) + words
            lines.append(
                (
                    *(name, _time(found[OURS]), _time(found.get(TORCH))),
                    f"{_time(other)}, {_named(other)}" if other else "none can",
                    *(_ratio(found.get(TORCH)), _ratio(other)),
                )
            )
            if other and (number(other, _column(other)) or 1) < 1:
                quicker.setdefault(plain(other["provider"]), []).append(name)
    losses = together([f"{provider} on {together(names)}" for provider, names in quicker.items()])
    notes = paragraph(
        f"Quicker than fastswa: {losses}." if losses else "No other is quicker.",
        "Times marked with a star were taken while other processes ran."
        if any("*" in line[1] for line in lines)
        else "",
        f"{commands(rows)} ({source}).",
    )
    return f"{paragraph(_summary(rows))}\n\n{table(HEADINGS, lines)}\n\n{notes}"


def _summary(rows: Sequence[Measurement]) -> str:
    """How many times as fast, and what the table shows."""
    column = _column(rows[0])
    gains = [number(row, column) for row in rows if row["provider"] == TORCH and not disturbed([row])]
    known = sorted(gain for gain in gains if gain is not None)
    words = f"{figure(known[0])} to {figure(known[-1])} times as fast as torch's `AveragedModel`. " if known else ""
    return (
        f"{words}Milliseconds of one update on {hardware(rows[0])}, medians of calls that take turns in one process "
        f"({scatter(rows[0])}):"
    )


def _quickest(found: dict[str, Measurement]) -> Measurement | None:
    others = [row for name, row in found.items() if name not in (TORCH, CEILING) and not name.startswith("fastswa ")]
    timed = [row for row in others if number(row, _column(row)) is not None]
    return min(timed, key=lambda row: number(row, _column(row)) or 0, default=None)


def _named(row: Measurement) -> str:
    """A provider, and what it does otherwise than fastswa with the buffers."""
    _, _, otherwise = row["checked"].partition(", ")
    return row["provider"] + (f" ({otherwise})" if otherwise and int(row["buffers"]) else "")


def _column(row: Measurement) -> str:
    """On a GPU the wait for it counts."""
    return "ratio_to_fastswa" if row["device"] == "cpu" else "wall_ratio_to_fastswa"


def _time(row: Measurement | None) -> str:
    if row is None:
        return "-"
    time = number(row, "p50_us" if row["device"] == "cpu" else "wall_us")
    if time is None:
        return "refuses"
    return figure(time / 1000) + ("\\*" if disturbed([row]) else "")


def _ratio(row: Measurement | None) -> str:
    if row is None:
        return "-"
    return ratio(row) if row["device"] == "cpu" else figure(number(row, _column(row)))
