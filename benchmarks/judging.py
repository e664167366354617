"""Judges a figure to reach by the rows of the benchmarks' CSV files.

Times are compared as ratios of one run, so a target holds on any machine. A bound of 1 asks that fastswa is not slower:
equal speeds fall on either side of 1, so it is kept where the 20 to 80 % interval of the ratio reaches 1; of a file of
several runs that is the widest interval of all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.pictures.measurements import NAMES, number
from benchmarks.tables.markdown import figure

Row = Mapping[str, Any]
"""A measurement by the names of its columns: text from a file, or the values of a row that was just measured."""

RATIO = "ratio_to_fastswa"


@dataclass(frozen=True)
class Target:
    """A bound on one quantity; where several rows hold it, on the worst.

    Args:
        device: "cpu" or "cuda".
        work: that it is about.
        command: of the benchmark that measures it.
        rows: values of the columns that select its rows; several are alternatives.
        column: that holds the quantity.
        quantity: in words.
        at_least: the bound from below, or
        at_most: the bound from above.
        inverse: whether the quantity is one over the column's value.
    """

    device: str
    work: str
    command: str
    rows: Mapping[str, Sequence[str]]
    column: str
    quantity: str
    at_least: float | None = None
    at_most: float | None = None
    inverse: bool = False

    @property
    def bound(self) -> str:
        """In signs."""
        return f">= {self.at_least:g}" if self.at_least is not None else f"<= {self.at_most:g}"

    def holds(self, row: Row) -> bool:
        """Whether a row is one of the target's.

        Args:
            row: of the target's command.
        """
        return all(row.get(column) in values for column, values in self.rows.items())


@dataclass(frozen=True)
class Verdict:
    """What the measurements say about a target.

    Args:
        target: that was judged.
        value: of the quantity; None where it was not measured.
        interval: its 20 and 80 % percentiles over the rounds; None where the file has none.
        case: of the row.
        limit: at most so many times as fast could fastswa be, if it moved its bytes as fast as the byte ceiling.
    """

    target: Target
    value: float | None = None
    interval: tuple[float, float] | None = None
    case: str = ""
    limit: float | None = None

    @property
    def word(self) -> str:
        """ "met", "NOT MET" or "not measured"."""
        if self.value is None:
            return "not measured"
        best = self.interval[1] if self.interval and self.target.at_least == 1 else self.value
        return "met" if self._margin(best) >= 0 else "NOT MET"

    @property
    def rank(self) -> tuple[bool, float]:
        """Lower for what is worse: what is not met before what is, and then by the value."""
        assert self.value is not None
        return self.word == "met", self._margin(self.value)

    def _margin(self, value: float) -> float:
        """How far a value is on the right side of the bound, in parts of the bound."""
        if self.target.at_least is None:
            assert self.target.at_most is not None
            return (self.target.at_most - value) / (self.target.at_most or 1.0)
        return value / self.target.at_least - 1

    @property
    def measured(self) -> str:
        """The value and its interval."""
        if self.value is None:
            return self.word
        interval = f" ({' to '.join(map(figure, self.interval))})" if self.interval else ""
        return figure(self.value) + interval

    @property
    def reason(self) -> str:
        """Why the bytes alone forbid a target that was not met; empty where they do not."""
        bound = self.target.at_least
        if self.word != "NOT MET" or bound is None or self.limit is None or self.limit >= bound:
            return ""
        return f"; at the byte ceiling it would be {figure(self.limit)}"

    def line(self) -> str:
        """The verdict in words."""
        if self.value is None:
            return f"not measured: {self.target.quantity} {self.target.bound}"
        where = f" on {NAMES.get(self.case, self.case)}" if self.case else ""
        return f"{self.word}: {self.measured} {self.target.quantity}{where}, asked {self.target.bound}{self.reason}"


def judge(target: Target, rows: Iterable[Row]) -> Verdict:
    """Judge a target by the worst of its rows.

    Args:
        target: to judge.
        rows: of the target's command and device.

    Returns:
        The verdict.
    """
    verdicts = [_of(target, row) for row in rows if target.holds(row)]
    measured = [verdict for verdict in verdicts if verdict.value is not None]
    if not measured:
        return Verdict(target)
    worst = min(measured, key=lambda verdict: verdict.rank)
    # Where all are the same, a name says nothing.
    return worst if len({verdict.value for verdict in measured}) > 1 else replace(worst, case="")


def _of(target: Target, row: Row) -> Verdict:
    def quantity(column: str) -> float | None:
        value = number(row, column)
        return 1 / value if target.inverse and value else value

    low_high = [quantity("ratio_p20"), quantity("ratio_p80")] if target.column == RATIO else [None]
    interval = None if None in low_high else tuple(sorted(low_high))  # type: ignore[type-var]
    share = number(row, "share_of_ceiling")
    limit = 1 / share if target.column == RATIO and share else None
    return Verdict(target, quantity(target.column), interval, row.get("case", ""), limit)  # type: ignore[arg-type]
