"""Makes one CSV file of those that several runs of a command wrote.

The percentiles of one run say how far its rounds scatter. Runs scatter further: memory lies otherwise in each process,
and a shared machine changes by the minute. So the numbers are those of the middle run, which go together, and the
intervals are the widest of all runs. Measurements that other processes disturbed do not count where there are others.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.compare import MEASURED, by_work
from benchmarks.pictures.measurements import Measurement, disturbed, number
from benchmarks.record import HEADINGS
from benchmarks.tables.files import load

_LOW, _HIGH = re.compile(r"p20_.*|.*_p20"), re.compile(r"p80_.*|.*_p80")
_COUNTS = ("rounds", "disturbed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options.

    Args:
        parser: of the command.
    """
    parser.add_argument("folders", type=Path, nargs="+", help="of CSV files, one of each run")
    parser.add_argument("--output", type=Path, required=True, help="folder of the merged files")


def run(arguments: argparse.Namespace) -> int:
    """Merge, and name what was written.

    Args:
        arguments: as `add_arguments` declares them.

    Returns:
        0; 2 where there is nothing to merge.
    """
    arguments.output.mkdir(parents=True, exist_ok=True)
    written = merge(arguments.folders, arguments.output)
    for path in written:
        print(path)
    if not written:
        print(f"no CSV file is in {', '.join(map(str, arguments.folders))}", file=sys.stderr)
    return 0 if written else 2


def merge(folders: Sequence[Path], output: Path) -> list[Path]:
    """Merge the files of several runs.

    Args:
        folders: with the CSV files of a run each; some may lack a file, or its rows.
        output: an existing folder for the merged files. Where a row is of more than one run, its command ends with
            their number, as a comment.

    Returns:
        The files that were written.
    """
    written = []
    for name in sorted({path.name for folder in folders for path in folder.glob("*.csv")}):
        files = [file for folder in folders for file in load(folder, folder.glob(name))]
        if files:
            _write(output / name, [file.rows for file in files])
            written.append(output / name)
    return written


def _write(path: Path, runs: Sequence[Sequence[Measurement]]) -> None:
    found: dict[tuple[str, ...], list[Measurement]] = {}
    # The middle one first, whose numbers are kept.
    middle = sorted(runs, key=_total)[(len(runs) - 1) // 2]
    for rows in (middle, *(rows for rows in runs if rows is not middle)):
        for key, row in by_work(rows):
            found.setdefault(key, []).append(row)
    together = []
    for rows in found.values():
        row = merged(rows)
        if len(rows) > 1:
            row["command"] += f" # {len(rows)} runs"
        together.append(row)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(HEADINGS.get(column, column) for column in together[0])
        writer.writerows(row.values() for row in together)


def _total(rows: Sequence[Measurement]) -> float:
    """The sum of all medians of a run."""
    return sum(number(row, column) or 0.0 for row in rows for column in row if column.startswith("p50_"))


def merged(rows: Sequence[Measurement]) -> Measurement:
    """One row for those of several runs.

    Args:
        rows: that differ in what was measured; the first one's numbers are kept, of those that were not disturbed in
            more than half of their rounds.

    Returns:
        The first, with the lowest of the 20 % percentiles and the highest of the 80 % percentiles; nothing where a run
        has no number. Rounds are added up. A wrong result stays one.

    Example:
        >>> merged([{"ratio_to_fastswa": "3.1", "ratio_p80": "3.3"}, {"ratio_to_fastswa": "3.0", "ratio_p80": "3.5"}])
        {'ratio_to_fastswa': '3.1', 'ratio_p80': '3.5'}
    """
    quiet = [row for row in rows if not disturbed([row])] or rows
    result = dict(quiet[0])
    for column in filter(MEASURED.fullmatch, result):
        values = [row[column] for row in quiet]
        if column == "checked":
            words = [row[column] for row in rows]
            result[column] = next((word for word in words if word.startswith(("wrong", "skipped"))), words[0])
        elif any(row[column] == "" for row in rows):
            result[column] = ""
        elif column in _COUNTS:
            result[column] = str(sum(map(int, values)))
        elif _LOW.fullmatch(column):
            result[column] = min(values, key=float)
        elif _HIGH.fullmatch(column):
            result[column] = max(values, key=float)
    return result
