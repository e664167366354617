"""What a run reports of each epoch: a line of a table, and a row of a CSV file."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from benchmarks.training.checkpoint import replace_file

NAME = "log.csv"
"""Of the file in a run's folder."""


@dataclass(frozen=True)
class Row:
    """An epoch; losses are mean cross entropies, accuracies in %; None where nothing was tested.

    Args:
        epoch: counted from 1.
        learning_rate: of its last iteration.
        train_loss, train_accuracy: of the batches as they were trained on.
        test_loss, test_accuracy: of the model on the test set, as the further ones are.
        swa_loss, swa_accuracy: of SWA's average, with its BatchNorm statistics recomputed.
        ema_loss, ema_accuracy: of the exponential average, likewise.
        swag_loss, swag_accuracy: of the mean prediction of SWAG's samples, each with statistics of its own.
        seconds: training, tests and BatchNorm passes.
    """

    epoch: int
    learning_rate: float
    train_loss: float
    train_accuracy: float
    test_loss: float | None = None
    test_accuracy: float | None = None
    swa_loss: float | None = None
    swa_accuracy: float | None = None
    ema_loss: float | None = None
    ema_accuracy: float | None = None
    swag_loss: float | None = None
    swag_accuracy: float | None = None
    seconds: float = 0.0


_TABLE = (
    ("epoch", "epoch", 5, "d"),
    ("lr", "learning_rate", 8, ".4g"),
    ("train loss", "train_loss", 10, ".4f"),
    ("train acc", "train_accuracy", 9, ".2f"),
    ("test loss", "test_loss", 9, ".4f"),
    ("test acc", "test_accuracy", 8, ".2f"),
    ("swa acc", "swa_accuracy", 7, ".2f"),
    ("ema acc", "ema_accuracy", 7, ".2f"),
    ("swag acc", "swag_accuracy", 8, ".2f"),
    ("seconds", "seconds", 7, ".1f"),
)
"""Heading, column, width and format."""


def heading() -> str:
    """The table's first line."""
    return "  ".join(title.rjust(width) for title, _, width, _ in _TABLE)


def line(row: Row) -> str:
    """An epoch's line in the table.

    Args:
        row: of the epoch.
    """
    values = [(getattr(row, column), width, style) for _, column, width, style in _TABLE]
    return "  ".join(("-" if value is None else format(value, style)).rjust(width) for value, width, style in values)


def write(path: Path, rows: Iterable[Row]) -> None:
    """Write the file anew: a resumed run's has the rows up to its checkpoint, whatever came after it.

    Args:
        path: of the file.
        rows: all so far.
    """
    text = _csv([[field.name for field in fields(Row)], *map(astuple, rows)])
    replace_file(path, lambda file: file.write(text.encode()))


def append(path: Path, row: Row) -> None:
    """Add an epoch to the file.

    Args:
        path: of the file.
        row: of the epoch.
    """
    with path.open("a", newline="") as file:
        file.write(_csv([astuple(row)]))


def _csv(rows: Iterable[Iterable[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for row in rows:
        writer.writerow(f"{value:.6g}" if isinstance(value, float) else value for value in row)
    return text.getvalue()
