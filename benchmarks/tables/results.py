"""The page of all measurements: the targets, and a table for each CSV file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from decimal import Decimal

from benchmarks.pictures.measurements import NAMES, Measurement
from benchmarks.tables.files import COLUMNS, File, gpus, verdicts
from benchmarks.tables.markdown import commands, table

PERCENTILES = ("p20", "p50", "p80")
RATIOS = ("ratio_p20", "ratio_to_fastswa", "ratio_p80")


def page(files: Sequence[File], pictures: Mapping[str, Sequence[str]]) -> str:
    """The page.

    Args:
        files: of a folder.
        pictures: the names of the files that each picture was drawn from, by its name.
    """
    parts = [
        "# Measurements",
        "Written by `python -m benchmarks report` from the CSV files beside it. A time is the median over the runs, a "
        "ratio the median over the rounds of this time over fastswa's in that round (above 1: fastswa is quicker); in "
        "brackets their 20 and 80 % percentiles. A file of several runs (`# 3 runs`) has the middle one's, and the "
        "widest interval of all. Columns that are empty in a file are left out.",
        "## Targets",
        _targets(files),
    ]
    for file in files:
        shown = [name for name, sources in pictures.items() if file.path.name in sources]
        parts += [f"## {file.path.name}", _origin(file.rows), _rows(file.rows)]
        parts += [f"![{name.removesuffix('.png').replace('_', ' ')}]({name})" for name in shown]
    if not gpus(files):
        parts += ["## GPU", "not measured yet"]
    return "\n\n".join(parts) + "\n"


def _targets(files: Sequence[File]) -> str:
    lines = []
    for device in ("cpu", *(gpus(files) or ["GPU"])):
        for verdict in verdicts(files, device):
            met = "" if verdict.word == "not measured" else verdict.word + verdict.reason
            on = f"{verdict.measured}, {NAMES.get(verdict.case, verdict.case)}" if verdict.case else verdict.measured
            asked = f"{verdict.target.bound} {verdict.target.quantity}"
            lines.append((device, verdict.target.work, asked, on.replace("not measured", "not measured yet"), met))
    note = "Where a target binds several rows, the worst is shown. A bound of 1 is kept where the interval reaches 1."
    return f"{table(('device', 'work', 'asked', 'measured', ''), lines)}\n\n{note}"


def _origin(rows: Sequence[Measurement]) -> str:
    """Hardware, versions and commands of a file."""
    first = rows[0]
    place = f"{first['threads']} threads of {first['cpu']}"
    place = place if first["device"] == "cpu" else f"{first['device']}, {place}"
    versions = ", ".join(f"{name} {first[name]}" for name in ("fastswa", "torch", "triton", "python"))
    return f"{place}; {versions}; {first['timestamp'][:10]}. {commands(rows)}"


def _rows(rows: Sequence[Measurement]) -> str:
    unit = next((column[4:] for column in rows[0] if column in ("p50_us", "p50_ms")), None)
    merged = {f"p50_{unit}": [f"{name}_{unit}" for name in PERCENTILES]} if unit else {}
    if all(column in rows[0] for column in RATIOS):
        merged["ratio_to_fastswa"] = list(RATIOS)
    hidden = {name for low, _, high in merged.values() for name in (low, high)} | set(COLUMNS)
    columns = [name for name in rows[0] if name not in hidden and any(row[name] for row in rows)]
    return table(
        [name.replace("_", " ") for name in columns], ([_cell(row, name, merged) for name in columns] for row in rows)
    )


def _cell(row: Measurement, column: str, merged: Mapping[str, Sequence[str]]) -> str:
    if not row[column] or column not in merged:
        return _plain(row[column])
    low, middle, high = (_plain(row[name]) for name in merged[column])
    return middle if low == middle == high else f"{middle} ({low} to {high})"


def _plain(value: str) -> str:
    """A number without an exponent, in the digits of its file."""
    return format(Decimal(value), "f") if re.fullmatch(r"-?[\d.]+e[+-]\d+", value) else value
