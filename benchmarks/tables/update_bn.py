"""A pass that recomputes BatchNorm statistics, against torch's, in a sentence for each network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.batch_norm.providers import OURS, TORCH
from benchmarks.pictures.measurements import NAMES, Measurement, number
from benchmarks.tables.files import File, gpus, link, rows_of
from benchmarks.tables.markdown import commands, hardware, milliseconds, paragraph, ratio


def update_bn(files: Sequence[File]) -> str:
    """The networks of a device after another.

    Args:
        files: of a folder.
    """
    parts = []
    for device in ("cpu", *gpus(files)):
        cases: dict[tuple[str, ...], dict[str, Measurement]] = {}
        rows = rows_of(files, "update_bn", device)
        for row in rows:
            cases.setdefault((row["case"], row["precision"], row["batches_from"]), {})[row["provider"]] = row
        if rows:
            sentences = [_sentence(own) for own in cases.values() if {OURS, TORCH} <= own.keys()]
            where = f"{hardware(rows[0])}: {commands(rows)} ({link(files, 'update_bn', device)})."
            parts.append(paragraph("Times a batch:", *sentences, where))
    if not gpus(files):
        parts.append("On a GPU: not measured yet.")
    return "\n".join(parts)


def _sentence(own: Mapping[str, Measurement]) -> str:
    ours, torch = own[OURS], own[TORCH]
    name = ours["case"].split("_batch")[0]
    words = f"{NAMES.get(name, name)} at batch {ours['batch_size']}"
    words += "" if ours["precision"] == "fp32" else f", {ours['precision'].replace('_', ' ')}"
    words += "" if ours["batches_from"] == "device" else f", batches from the {ours['batches_from']}"
    # 0.3 is a counter that is read now and then.
    reads = (f"{number(row, 'device_reads_per_batch') or 0:g}" for row in (ours, torch))
    return (
        f"{words}: {milliseconds(ours)} ms, torch {milliseconds(torch)}, {ratio(torch)} times torch's speed, "
        "device reads {}, torch {}.".format(*reads)
    )
