"""Runs all benchmarks of one device, each in a process of its own, and says which targets are met.

The sizes are chosen for a CPU of two cores: `python -m benchmarks all` is to take under ten minutes there.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import torch

from benchmarks import record
from benchmarks.judging import Verdict
from benchmarks.merge import merge
from benchmarks.tables.files import load, verdicts

PARTS: dict[str, str] = {
    "update": "",
    "update_bn": "update_bn-",
    "swap": "swap-",
    "scaling": "scaling-",
    "step": "step-",
    "cold": "cold-",
    "integrations": "integrations-",
}
"""The commands, and how the names of their files begin."""
SHORTER = {
    "cpu": {
        "swap": ["--cases", "resnet20", "preresnet164", "resnet50"],
        "scaling": ["--series", "size", "averages", "--largest", "10000000"],
        "cold": ["--rounds", "3", "--cases", "resnet20", "preresnet164"],
        "integrations": ["--cases", "resnet50", "--seconds-per-case", "1.5"],
    }
}
"""Options with which a part takes less than it would alone."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options.

    Args:
        parser: of the command.
    """
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--output", type=Path, default=record.RESULTS, help="folder of the CSV files (%(default)s)")
    parser.add_argument("--runs", type=int, default=1, help="of every part, to be merged (%(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Run the parts, then judge what they measured.

    Args:
        arguments: as `add_arguments` declares them.

    Returns:
        0; 1 if a part failed, as one does whose result is wrong. A target that is not met is no failure.
    """
    device = torch.device(arguments.device)
    arguments.output.mkdir(parents=True, exist_ok=True)
    began, failed = time.time(), []
    written: list[Path] = []
    with tempfile.TemporaryDirectory() as directory:
        runs = [Path(directory, str(number)) for number in range(arguments.runs)]
        for folder, (part, prefix) in product(runs, PARTS.items()):
            if not _run(part, device, folder / record.default_path(device, prefix).name):
                failed.append(part)
            # Each time, so that a run that is broken off has left what it measured.
            written = merge(runs, arguments.output)
    print(f"\nall: {time.time() - began:.0f} s\n")
    print(table(verdicts(load(arguments.output, written), record.device_name(device))))
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def _run(part: str, device: torch.device, path: Path) -> bool:
    """Run a part in a process of its own, and say whether all went well."""
    options = ["--device", device.type, "--output", str(path), *SHORTER.get(device.type, {}).get(part, [])]
    print(f"\n{part} {' '.join(options)}", flush=True)
    start = time.time()
    status = subprocess.run([sys.executable, "-m", "benchmarks", part, *options], check=False).returncode
    print(f"{part}: {time.time() - start:.0f} s", flush=True)
    if status:
        print(f"{part}: exit status {status}", file=sys.stderr)
    return not status


def table(found: Sequence[Verdict]) -> str:
    """A line for each target, and their number.

    Args:
        found: of a device.
    """
    width = max(len(verdict.target.work) for verdict in found)
    lines = [f"{verdict.target.work:{width}}  {verdict.line()}" for verdict in found]
    counts = [f"{sum(verdict.word == word for verdict in found)} {word}" for word in ("met", "NOT MET", "not measured")]
    return "\n".join((*lines, ", ".join(counts)))
