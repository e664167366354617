"""Draws the pictures of benchmarks/README.md from the committed CSV files, and measures nothing.

Each picture names the hash of the files that it was drawn from, so that a test can tell when it is out of date.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path
from types import ModuleType

from benchmarks.record import RESULTS


def pictures() -> dict[str, ModuleType]:
    """What draws each picture: a module with `FILES`, the names of CSV files, and `draw(results) -> Figure`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from benchmarks.pictures import several_averages, update, update_bn
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "matplotlib":
            raise
        raise ImportError("the pictures are drawn with matplotlib: pip install fastswa[demo]") from error
    return {"update.png": update, "several_averages.png": several_averages, "update_bn.png": update_bn}


def source(results: Path, files: tuple[str, ...]) -> str:
    """The hash that a picture carries under "Source".

    Args:
        results: folder of the files.
        files: in order.
    """
    content = b"".join((results / file).read_bytes() for file in files)
    return f"{', '.join(files)}: sha256 {hashlib.sha256(content).hexdigest()}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options.

    Args:
        parser: of the command.
    """
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files (%(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the pictures (%(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Draw all pictures.

    Args:
        arguments: as `add_arguments` declares them.

    Returns:
        0; 1 if a file is missing or lacks a column.
    """
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, module in pictures().items():
        try:
            figure = module.draw(arguments.results)
        except (OSError, ValueError) as error:
            print(f"{name}: {error}", file=sys.stderr)
            return 1
        path = arguments.output / name
        figure.savefig(path, metadata={"Source": source(arguments.results, module.FILES)})
        print(f"{path} from {', '.join(module.FILES)}")
    return 0
