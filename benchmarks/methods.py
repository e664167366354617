"""Compares SGD, SWA with a constant and with a cyclical rate, EMA and SWAG on scikit-learn's digits, over seeds.

Every run has the same network, number of epochs and batches, and for a seed the same start and the same split into 160
training and 1637 test images, so that the methods are compared seed by seed. SWAG's models are those of SWA with a
constant rate and the EMA is the SGD run's: collecting them changes nothing in the training. All is float64, so that the
numbers do not depend on how a processor rounds.
"""

from __future__ import annotations

import argparse
import sys
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import record
from benchmarks.training import loop
from benchmarks.training.comparison import EMA_DECAY, METHODS, Result, draw, table
from benchmarks.training.options import Options

RUNS: dict[str, dict[str, Any]] = {
    "sgd": {"ema_decay": EMA_DECAY},
    "swa-constant": {"swa": True, "swag": True},
    "swa-cyclical": {"swa": True, "swa_schedule": "cyclical"},
}
"""Options of each run; all others are what `Options.of` takes for digits."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options.

    Args:
        parser: of the command.
    """
    parser.add_argument("--seeds", type=int, default=5, help="repetitions, with seeds 0, 1, ... (%(default)s)")
    parser.add_argument(
        "--epochs", type=int, default=60, help="of each run; SWA averages the last quarter (%(default)s)"
    )
    parser.add_argument("--output", type=Path, default=record.RESULTS, help="folder of digits-cpu.csv and digits.png")


def run(arguments: argparse.Namespace) -> int:
    """Train with every method and seed, print a table, write the CSV file, draw.

    Args:
        arguments: as `add_arguments` declares them.

    Returns:
        0; 2 for a number of seeds or epochs that can't be compared.
    """
    if arguments.seeds < 2 or arguments.epochs < 2:
        print("methods needs at least 2 seeds, for a deviation, and 2 epochs, for SWAG's spread", file=sys.stderr)
        return 2
    # Enough for so small a network, and the numbers are then the same on any number of cores.
    torch.set_num_threads(1)
    command = f"python -m benchmarks methods --seeds {arguments.seeds} --epochs {arguments.epochs}"
    results: list[Result] = []
    for seed, name in tqdm(list(product(range(arguments.seeds), RUNS)), unit="run"):
        results += trained(name, seed, arguments.epochs, command)
    print(table(results))
    record.write(arguments.output / "digits-cpu.csv", results, Result)
    draw(arguments.output / "digits.png", results)
    return 0


def trained(name: str, seed: int, epochs: int, command: str) -> list[Result]:
    """Train one run.

    Args:
        name: a key of `RUNS`.
        seed: of the run.
        epochs: of the run.
        command: that was given.

    Returns:
        What each of its methods reached.
    """
    given = {"epochs": epochs, "eval_every": epochs, "seed": seed, "double": True, **RUNS[name]}
    if "swa" in given:
        # The last quarter, and two models at least.
        given["swa_start"] = min(epochs * 3 // 4 + 1, epochs - 1)
    options = Options.of("digits", **given)
    environment = record.environment(torch.device("cpu"), command)
    scores = loop.train(options, loop.images_for(options)).scores
    # Rounded as the file holds them, so that the table is the file's.
    return [
        Result(
            **environment,
            method=method,
            run=name,
            seed=seed,
            epochs=epochs,
            test_accuracy=round(scores[score].accuracy, 2),
            test_loss=round(scores[score].loss, 4),
        )
        for method, (run, score) in METHODS.items()
        if run == name
    ]
