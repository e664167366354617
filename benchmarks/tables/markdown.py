"""Tables and numbers as they stand in a Markdown page."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence

from benchmarks.pictures.measurements import Measurement, number


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table.

    Args:
        headings: of the columns.
        rows: of cells, as many in each.
    """
    lines = ["| " + " | ".join(map(plain, line)) + " |" for line in (headings, *rows)]
    lines.insert(1, "|---" * len(headings) + "|")
    # An empty cell needs no second space.
    return "\n".join(line.replace("|  |", "| |").replace("|  |", "| |") for line in lines)


def paragraph(*sentences: str) -> str:
    """Prose in lines of at most 120 characters, where words allow.

    Args:
        *sentences: of the paragraph; empty ones are left out.
    """
    return textwrap.fill(" ".join(filter(None, sentences)), 120, break_long_words=False, break_on_hyphens=False)


def plain(text: str) -> str:
    """Text whose underscores and bars mean themselves, but for code in backquotes.

    Args:
        text: of a cell or a sentence.

    Example:
        >>> plain("cached _foreach_lerp_, `x_y`")
        'cached \\\\_foreach\\\\_lerp\\\\_, `x_y`'
    """
    return re.sub(r"(`[^`]*`)|([_|])", lambda found: found[1] or f"\\{found[2]}", text)


def figure(value: float | None) -> str:
    """A number to three digits, or more before the point.

    Args:
        value: None for one that was not measured.

    Example:
        >>> figure(0.0123456), figure(12.0), figure(1234.5), figure(None)
        ('0.0123', '12.0', '1234', '-')
    """
    if value is None:
        return "-"
    if value == 0:
        return "0"
    return f"{value:.0f}" if abs(value) >= 99.95 else f"{value:#.3g}".rstrip(".")


def milliseconds(row: Measurement) -> str:
    """The median of a row in ms, whichever unit its file has.

    Args:
        row: of a file with p50_us or p50_ms.
    """
    time = number(row, "p50_us")
    return figure(number(row, "p50_ms") if time is None else time / 1000)


def ratio(row: Measurement) -> str:
    """How many times as fast as the row fastswa is, with the interval over the rounds where the file has it.

    Args:
        row: of a file with ratio_to_fastswa.
    """
    low, high = number(row, "ratio_p20"), number(row, "ratio_p80")
    interval = "" if low is None or high is None else f" ({figure(low)} to {figure(high)})"
    return figure(number(row, "ratio_to_fastswa")) + interval


def scatter(row: Measurement) -> str:
    """What the interval of a ratio is, in words.

    Args:
        row: of any file.
    """
    runs = re.search(r"# (\d+) runs$", row["command"])
    if runs is None:
        return "20 to 80 % of the rounds in brackets"
    return f"the middle one of {runs[1]} runs, from the least 20 % to the greatest 80 % percentile in brackets"


def hardware(row: Measurement) -> str:
    """Where and with what a row was measured, in words.

    Args:
        row: of any file.
    """
    place = row["device"] if row["device"] != "cpu" else f"{row['threads']} threads of an {row['cpu']}"
    return f"{place}, torch {row['torch'].split('+')[0]}"


def commands(rows: Iterable[Measurement]) -> str:
    """The commands that made some rows.

    Args:
        rows: of any file.
    """
    return ", ".join(dict.fromkeys(f"`{row['command']}`" for row in rows))


def together(words: Sequence[str]) -> str:
    """An enumeration.

    Args:
        words: its parts.

    Example:
        >>> together(["a"]), together(["a", "b", "c"])
        ('a', 'a, b and c')
    """
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))
