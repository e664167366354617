"""How a command that measures ends: it says where its rows are, and which of fastswa's results were wrong."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.verify import right


def wrong_results(rows: Sequence[Any], *columns: str) -> list[str]:
    """What fastswa got wrong, in words.

    Args:
        rows: with the columns `provider` and `checked`.
        *columns: that tell the rows of one provider apart.

    Returns:
        A line for each wrong result, none for the peers'.
    """
    return [
        ", ".join(str(getattr(row, column)) for column in columns) + f": {row.provider}: {row.checked}"
        for row in rows
        if row.provider.startswith("fastswa ") and not right(row.checked)
    ]


def end(path: Path, rows: Sequence[object], wrong: Sequence[str]) -> int:
    """Say how it went.

    Args:
        path: of the rows' file.
        rows: that were measured.
        wrong: results, in words.

    Returns:
        The exit status: 1 if something was wrong.
    """
    print(f"{len(rows)} measurements in {path}")
    for words in wrong:
        print(words, file=sys.stderr)
    return int(bool(wrong))
