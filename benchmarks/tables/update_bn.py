"""A pass that recomputes BatchNorm statistics, against torch's, in a sentence for each network."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.batch_norm.providers import OURS, TORCH
from benchmarks.pictures.measurements import NAMES, Measurement, number
from benchmarks.tables.files import File, gpus, link, rows_of
from benchmarks.tables.markdown import commands, hardware, milliseconds, paragraph, ratio, table

HEADINGS = ("ms a batch", "fastswa", "torch", "times torch's speed", "device reads a batch", "torch's")


def update_bn(files: Sequence[File]) -> str:
    """The table of a device after another.

    Args:
        files: of a folder.
    """
    parts = []
    for device in ("cpu", *gpus(files)):
        rows = rows_of(files, "update_bn", device)
        if rows:
            where = f"{hardware(rows[0])}: {commands(rows)} ({link(files, 'update_bn', device)})."
            parts.append(f"{table(HEADINGS, _lines(rows))}\n\n{paragraph(where)}")
    return "\n\n".join(parts) + ("" if gpus(files) else "\nOn a GPU: not measured yet.")


def _lines(rows: Sequence[Measurement]) -> list[tuple[str, ...]]:
    cases: dict[tuple[str, ...], dict[str, Measurement]] = {}
    for row in rows:
        cases.setdefault((row["case"], row["precision"], row["batches_from"]), {})[row["provider"]] = row
    lines = []
    for (case, precision, source), own in cases.items():
        ours, torch = own[OURS], own[TORCH]
        name = case.split("_batch")[0]
        words = f"{NAMES.get(name, name)}, batch {ours['batch_size']}"
        words += "" if precision == "fp32" else f", {precision.replace('_', ' ')}"
        words += "" if source == "device" else f", batches from the {source}"
        reads = (f"{number(row, 'device_reads_per_batch'):g}" for row in (ours, torch))
        lines.append((words, milliseconds(ours), milliseconds(torch), ratio(torch), *reads))
    return lines
