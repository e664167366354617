"""The CSV files of a folder, each with the command and the device that its rows name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.judging import Verdict, judge
from benchmarks.pictures.measurements import Measurement, read
from benchmarks.targets import TARGETS

COLUMNS = ("timestamp", "device", "cpu", "threads", "command", "fastswa", "torch", "triton", "python")
"""That every file has: those of `record.Environment`."""


@dataclass(frozen=True)
class File:
    """Measurements of one command on one device.

    Args:
        path: of the file.
        rows: in order.
    """

    path: Path
    rows: Sequence[Measurement]

    @property
    def command(self) -> str:
        """The benchmark that wrote the file, such as "update_bn"."""
        found = re.match(r"python -m benchmarks (\w+)", self.rows[0]["command"])
        if found is None:
            raise ValueError(f"{self.path}: its column 'command' holds no benchmark")
        return found[1]

    @property
    def device(self) -> str:
        """ "cpu" or the GPU's name."""
        return self.rows[0]["device"]


def load(folder: Path, paths: Iterable[Path] | None = None) -> list[File]:
    """Read the measurements of a folder, without those in folders below it.

    Args:
        folder: of the files.
        paths: of some of them; default: all.

    Returns:
        The files by name, without those that have no rows: there nothing could be measured.

    Raises:
        ValueError: a file lacks the columns that say where its rows were measured.
    """
    found = sorted(folder.glob("*.csv") if paths is None else paths)
    return [File(path, read(path, COLUMNS)) for path in found if len(path.read_text().splitlines()) > 1]


def rows_of(files: Iterable[File], command: str, device: str = "cpu") -> list[Measurement]:
    """All rows of a command.

    Args:
        files: of a folder.
        command: of the benchmark.
        device: "cpu" or a GPU's name.
    """
    return [row for file in files if (file.command, file.device) == (command, device) for row in file.rows]


def link(files: Iterable[File], command: str, device: str = "cpu") -> str:
    """A link from the root of the checkout to a command's rows.

    Args:
        files: of a folder.
        command: of the benchmark.
        device: "cpu" or a GPU's name.
    """
    paths = [file.path for file in files if (file.command, file.device) == (command, device)]
    return ", ".join(f"[rows](benchmarks/results/{path.name})" for path in paths)


def gpus(files: Iterable[File]) -> list[str]:
    """The names of the GPUs that were measured.

    Args:
        files: of a folder.
    """
    return sorted({file.device for file in files} - {"cpu"})


def verdicts(files: Sequence[File], device: str) -> list[Verdict]:
    """All targets of a device.

    Args:
        files: of a folder.
        device: "cpu" or a GPU's name.

    Returns:
        A verdict for each, those without measurements among them.
    """
    kind = "cpu" if device == "cpu" else "cuda"
    return [judge(target, rows_of(files, target.command, device)) for target in TARGETS if target.device == kind]
