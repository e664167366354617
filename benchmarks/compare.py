"""Compares two folders of CSV files, such as a run of one's own with the committed one: which ratios differ?

A row is the same in both where all its columns but the measured ones agree. Times drift from day to day on one machine,
ratios of times of one run should not: a ratio is reproduced where its 20 to 80 % intervals in the two overlap. What
other processes disturbed in more than half of its rounds says nothing, and is not compared.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.pictures.measurements import Measurement, disturbed, number
from benchmarks.record import RESULTS
from benchmarks.tables.files import COLUMNS, load
from benchmarks.tables.markdown import figure

MEASURED = re.compile(
    r"(.+_)?(us|ms|per_second|per_batch|reads)|share_of_.*|.*ratio_.*"
    r"|launches|peak_extra_bytes|rounds|disturbed|checked|test_.*"
)
"""Columns that a repetition may change."""
VERSIONS = ("fvcore", "version")
"""These and `COLUMNS` are no part of the work either."""
HARDWARE = ("device", "cpu", "threads")

Key = tuple[str, ...]


@dataclass
class Comparison:
    """How far two files agree.

    Args:
        overlap: rows whose intervals overlap.
        apart: a line for each row whose intervals do not.
        alone: a line for each row that only one of the files has.
        untimed: rows without an interval in one of them.
        disturbed: rows that were disturbed in one of them.
    """

    overlap: int = 0
    apart: list[str] = field(default_factory=list)
    alone: list[str] = field(default_factory=list)
    untimed: int = 0
    disturbed: int = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options.

    Args:
        parser: of the command.
    """
    parser.add_argument("folder", type=Path, help="of CSV files")
    parser.add_argument("other", type=Path, nargs="?", default=RESULTS, help="to compare them with (%(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Compare the files that both folders have, and print what differs.

    Args:
        arguments: as `add_arguments` declares them.

    Returns:
        0, whatever differs: it says something about two machines or days, not about right and wrong. 2 where there is
        nothing to compare.
    """
    try:
        folders = [{file.path.name: file for file in load(each)} for each in (arguments.folder, arguments.other)]
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    names = [name for name in folders[0] if name in folders[1]]
    if not names:
        print(f"no CSV file is in both {arguments.folder} and {arguments.other}", file=sys.stderr)
        return 2
    total = Comparison()
    for name in names:
        one, other = (folder[name] for folder in folders)
        found = compare(one.rows, other.rows)
        print(f"{name}: {_counts(found)}")
        for column in HARDWARE:
            if one.rows[0][column] != other.rows[0][column]:
                print(f"  another {column}: {one.rows[0][column]}, {other.rows[0][column]}")
        for line in (*found.apart, *found.alone):
            print(f"  {line}")
        total.overlap += found.overlap
        total.apart += found.apart
        total.alone += found.alone
        total.untimed += found.untimed
        total.disturbed += found.disturbed
    print(f"together: {_counts(total)}")
    return 0


def compare(one: Sequence[Measurement], other: Sequence[Measurement]) -> Comparison:
    """Compare the ratios of two files of a command.

    Args:
        one: rows of the first.
        other: rows of the second.

    Returns:
        What agrees and what does not.
    """
    found = Comparison()
    keyed, others = dict(by_work(one)), dict(by_work(other))
    for key in dict.fromkeys((*keyed, *others)):
        words = ", ".join(filter(None, key))
        if key not in keyed or key not in others:
            found.alone.append(f"only in the {'first' if key in keyed else 'second'}: {words}")
            continue
        first, second = _interval(keyed[key]), _interval(others[key])
        if first is None or second is None:
            found.untimed += 1
        elif disturbed([keyed[key], others[key]]):
            found.disturbed += 1
        elif first[0] <= second[1] and second[0] <= first[1]:
            found.overlap += 1
        else:
            found.apart.append(f"apart: {words}: {_words(keyed[key])} and {_words(others[key])}")
    return found


def by_work(rows: Sequence[Measurement]) -> Iterator[tuple[Key, Measurement]]:
    """What tells each row from the others of its file.

    Args:
        rows: of a file.

    Yields:
        The values of the columns that say what was measured, and the row.
    """
    for row in rows:
        yield (
            tuple(row[name] for name in row if name not in (*COLUMNS, *VERSIONS) and not MEASURED.fullmatch(name)),
            row,
        )


def _interval(row: Measurement) -> tuple[float, float] | None:
    low, high = number(row, "ratio_p20"), number(row, "ratio_p80")
    # What all others are compared with has no ratio of its own.
    return None if low is None or high is None or low == high == 1 else (low, high)


def _words(row: Measurement) -> str:
    return "{} ({} to {})".format(
        *(figure(number(row, name)) for name in ("ratio_to_fastswa", "ratio_p20", "ratio_p80"))
    )


def _counts(found: Comparison) -> str:
    return (
        f"{found.overlap} ratios reproduced, {len(found.apart)} apart, {found.disturbed} disturbed, "
        f"{found.untimed} rows without an interval, {len(found.alone)} in one of the two"
    )
