"""What averaging gives on digits: means and standard deviations over the seeds."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev

from benchmarks.tables.files import File, link, rows_of
from benchmarks.tables.markdown import commands, hardware, paragraph, table

BASELINE = "SGD"
HEADINGS = ("method", "test accuracy in %", "test loss", "accuracy less SGD's, seed by seed")


def methods(files: Sequence[File]) -> str:
    """The table.

    Args:
        files: of a folder.
    """
    rows = rows_of(files, "methods")
    if not rows:
        return "Not measured yet."
    found: dict[str, dict[str, list[float]]] = {}
    # By seed, so that each method's values can be compared with the baseline's.
    for row in sorted(rows, key=lambda row: int(row["seed"])):
        values = found.setdefault(row["method"], {"test_accuracy": [], "test_loss": []})
        for column, of_seeds in values.items():
            of_seeds.append(float(row[column]))
    lines = []
    for method, values in found.items():
        accuracy, loss, baseline = values["test_accuracy"], values["test_loss"], found[BASELINE]["test_accuracy"]
        gains = [ours - theirs for ours, theirs in zip(accuracy, baseline, strict=True)]
        gain = "" if method == BASELINE else f"{mean(gains):+.2f} ± {stdev(gains):.2f}"
        lines.append(
            (method, f"{mean(accuracy):.2f} ± {stdev(accuracy):.2f}", f"{mean(loss):.3f} ± {stdev(loss):.3f}", gain)
        )
    where = f"{hardware(rows[0])}: {commands(rows)} ({link(files, 'methods')})"
    return f"{table(HEADINGS, lines)}\n\n{paragraph(f'Means ± standard deviations; {where}.')}"
