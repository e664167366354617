"""The part of a training step that averaging takes, in a sentence for each network."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.pictures.measurements import NAMES, Measurement, number
from benchmarks.tables.files import File, gpus, link, rows_of
from benchmarks.tables.markdown import commands, figure, hardware, paragraph, plain, together


def step(files: Sequence[File]) -> str:
    """A sentence for each network and device.

    Args:
        files: of a folder.
    """
    parts = []
    for device in ("cpu", *gpus(files)):
        rows = rows_of(files, "step", device)
        sentences = [
            _sentence([row for row in rows if row["case"] == case]) for case in dict.fromkeys(map(_case, rows))
        ]
        if rows:
            parts.append(
                paragraph(*sentences, f"{hardware(rows[0])}: {commands(rows)} ({link(files, 'step', device)}).")
            )
    return "\n\n".join(parts) or "The share of a training step: not measured yet."


def _case(row: Measurement) -> str:
    return row["case"]


def _sentence(rows: Sequence[Measurement]) -> str:
    timed = [row for row in rows if row["share_of_step"]]
    shares = [f"{figure(100 * (number(row, 'share_of_step') or 0))} % with {plain(row['provider'])}" for row in timed]
    name = NAMES.get(rows[0]["case"], rows[0]["case"])
    time = figure((number(rows[0], "step_p50_us") or 0) / 1000)
    return f"Of a training step of {name} ({time} ms without it), averaging takes {together(shares)}."
