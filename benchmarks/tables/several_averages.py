"""Several averages in one pass, and one average with stochastic rounding, in sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.pictures.measurements import NAMES, Measurement
from benchmarks.tables.files import File, link, rows_of
from benchmarks.tables.markdown import commands, hardware, milliseconds, paragraph
from benchmarks.weight_averages import LISTS, NEAREST, ONE_PASS, PASSES, STOCHASTIC, TIMM

FOUR, ROUNDED = "fp32_k4", "bf16_stochastic"


def several_averages(files: Sequence[File]) -> str:
    """A sentence for each network.

    Args:
        files: of a folder.
    """
    rows = [row for row in rows_of(files, "update") if row.get("plan") in (FOUR, ROUNDED)]
    if not rows:
        return "Not measured yet."
    found: dict[tuple[str, str], dict[str, Measurement]] = {}
    for row in rows:
        found.setdefault((row["plan"], row["case"]), {})[row["provider"]] = row
    sentences = [
        sentence
        for (plan, case), own in sorted(found.items(), reverse=True)
        for sentence in _sentences(plan, case, own)
    ]
    return paragraph(*sentences, f"{hardware(rows[0])}: {commands(rows)} ({link(files, 'update')}).")


def _sentences(plan: str, case: str, own: Mapping[str, Measurement]) -> list[str]:
    times = {name: f"{milliseconds(row)} ms" for name, row in own.items() if row["p50_us"]}
    name = NAMES.get(case, case)
    if plan == FOUR and {ONE_PASS, PASSES, LISTS} <= times.keys():
        return [
            f"Four averages of {name} in one pass take {times[ONE_PASS]}, a pass each {times[PASSES]}, "
            f"cached lists a list each {times[LISTS]}."
        ]
    if plan == ROUNDED and {STOCHASTIC, NEAREST, TIMM} <= times.keys():
        return [
            f"One bfloat16 average of {name} with stochastic rounding takes {times[STOCHASTIC]}, timm's {times[TIMM]}; "
            f"to nearest {times[NEAREST]}."
        ]
    return []
