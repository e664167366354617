"""Measurements read back from their CSV files."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import ROUNDS
from benchmarks.record import HEADINGS

Measurement = dict[str, str]
"""A row by the names of its columns, as they are before `record.HEADINGS` explains them."""

NAMES = {
    "digits": "the demo's network",
    "mlp": "MLP",
    "resnet20": "ResNet-20",
    "preresnet164": "PreResNet-164",
    "resnet50": "ResNet-50",
    "vit_b": "ViT-B",
    "gpt2": "GPT-2",
}
"""Of the networks, for the reader."""


def read(path: Path, columns: Iterable[str]) -> list[Measurement]:
    """Read a file.

    Args:
        path: of the file.
        columns: that are needed.

    Returns:
        The rows, in order.

    Raises:
        ValueError: a column is missing, or there are no rows.
    """
    explained = {heading: column for column, heading in HEADINGS.items()}
    with path.open(newline="") as file:
        rows = [{explained.get(name, name): value for name, value in row.items()} for row in csv.DictReader(file)]
    if not rows:
        raise ValueError(f"{path} has no rows")
    missing = [column for column in columns if column not in rows[0]]
    if missing:
        raise ValueError(f"{path} has no column {', '.join(map(repr, missing))}: repeat the command that wrote it")
    return rows


def number(row: Mapping[str, Any], column: str) -> float | None:
    """A value, or None where nothing was measured or there is no such column.

    Args:
        row: of a file, or the values of one.
        column: of the row.
    """
    value = row.get(column)
    return None if value is None or value == "" else float(value)


def origin(rows: Sequence[Measurement]) -> str:
    """Hardware, versions and command, in a line; several where the rows differ.

    Args:
        rows: with the columns of `record.Environment`.
    """
    found = dict.fromkeys(
        f"{row['threads']} threads of {row['cpu']}, torch {row['torch']}: {row['command']}"
        if row["device"] == "cpu"
        else f"{row['device']}, torch {row['torch']}: {row['command']}"
        for row in rows
    )
    return "\n".join(found)


ORIGIN = ("device", "cpu", "threads", "torch", "command")
"""The columns that `origin` needs."""


def disturbed(rows: Iterable[Measurement]) -> bool:
    """Whether other processes ran in more than half of the rounds of any row.

    Args:
        rows: with the column "disturbed" where it was noticed, and "rounds" where they were not all of `ROUNDS`.
    """
    return any(2 * int(row.get("disturbed") or 0) > int(row.get("rounds") or ROUNDS) for row in rows)


def milliseconds(time: float) -> str:
    """A time for the eye: three digits, or more before the point.

    Args:
        time: in ms.
    """
    return f"{time:.0f} ms" if time >= 99.95 else f"{time:#.3g} ms"
