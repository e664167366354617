"""Draws the pictures and writes the tables of the measurements from the committed CSV files, and measures nothing.

Each picture names the hash of the files that it was drawn from, so that a test can tell when it is out of date. The
tables stand in results/README.md, and in the main README between marks.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path
from types import ModuleType

from benchmarks.record import RESULTS
from benchmarks.tables import blocks, results
from benchmarks.tables.files import load

README = RESULTS.parents[1] / "README.md"


def pictures() -> dict[str, ModuleType]:
    """What draws each picture: a module with `FILES`, the names of CSV files, and `draw(results) -> Figure`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from benchmarks.pictures import bandwidth, scaling, several_averages, update, update_bn
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "matplotlib":
            raise
        raise ImportError("the pictures are drawn with matplotlib: pip install fastswa[demo]") from error
    return {
        "update.png": update,
        "several_averages.png": several_averages,
        "bandwidth.png": bandwidth,
        "scaling.png": scaling,
        "update_bn.png": update_bn,
    }


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
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of pictures and README.md (%(default)s)")
    parser.add_argument("--readme", type=Path, default=README, help="whose marked tables are rewritten (%(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Draw all pictures and write all tables.

    Args:
        arguments: as `add_arguments` declares them.

    Returns:
        0; 1 if a file lacks a column, or a mark in the README names no table; whatever stands before it is written.
    """
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, module in pictures().items():
        if missing := [file for file in module.FILES if not (arguments.results / file).exists()]:
            print(f"{name}: not drawn, {', '.join(missing)} is not there")
            continue
        try:
            figure = module.draw(arguments.results)
        except ValueError as error:
            print(f"{name}: {error}", file=sys.stderr)
            return 1
        path = arguments.output / name
        figure.savefig(path, metadata={"Source": source(arguments.results, module.FILES)})
        print(f"{path} from {', '.join(module.FILES)}")
    try:
        files = load(arguments.results)
        texts = {
            arguments.output / "README.md": results.page(
                files, {name: each.FILES for name, each in pictures().items()}
            ),
            arguments.readme: blocks.rewritten(arguments.readme.read_text(), files),
        }
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    for path, text in texts.items():
        path.write_text(text)
        print(f"{path} from {', '.join(file.path.name for file in files)}")
    return 0
