"""Draws the SWA paper's figure for scikit-learn's digits: SGD's walk on the plane of three of its points.

A network is trained twice, from the same pre-trained weights on: once with a constant and once with a cyclical learning
rate. The first, the middle and the last of the models that SWA averages span a plane in each run. On it the loss on the
training images and the error on the test images are found, with BatchNorm statistics recomputed at every point.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

import fastswa
from benchmarks.record import RESULTS, Environment, environment, write
from benchmarks.training import augmentation, loop
from benchmarks.training.datasets import Dataset
from benchmarks.training.evaluation import evaluate
from benchmarks.training.options import SCHEDULES, Options
from fastswa.plane import PlaneGrid, WeightPlane, plot

LOSS, ERROR = "training loss", "test error in %"

CORNERS = ("first", "middle", "last")

AVERAGE = "SWA"


@dataclass(frozen=True)
class Row(Environment):
    """A model that was averaged, or the average.

    Args:
        schedule: of the learning rate.
        seed: of the run.
        weights: "first", "middle" and "last" of those that span the plane; "SWA"; empty for the others.
        iteration: after which the model was taken; of the average, the last model's.
        x, y: on the plane.
        distance: from the plane.
        training_loss: mean cross entropy over the training images, after BatchNorm statistics were recomputed.
        test_error: in %, likewise.
    """

    schedule: str
    seed: int
    weights: str
    iteration: int
    x: float
    y: float
    distance: float
    training_loss: float
    test_error: float


class Images:
    """What models are measured on, and the batches that their BatchNorm statistics come from.

    Args:
        dataset: of the run.
        options: of the run.
    """

    def __init__(self, dataset: Dataset, options: Options) -> None:
        self.training = list(augmentation.Batches(dataset, dataset.training_images, dataset.training_labels, 512))
        self.test = list(augmentation.test_batches(dataset, 512))
        # The same at every point, so that points differ by their weights alone.
        self.statistics = list(augmentation.statistics_batches(dataset, options.batch_size, options.seed, 0))

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Loss and error of a model as it stands."""
        test = evaluate(model, self.test, "cpu")
        return {LOSS: evaluate(model, self.training, "cpu").loss, ERROR: 100 - test.accuracy}


class Walk:
    """A run's averaged models, their average, and the plane of three of them.

    Args:
        options: of the run.
        dataset: of the run.
    """

    def __init__(self, options: Options, dataset: Dataset) -> None:
        self.options = options
        self.models: dict[int, nn.Module] = {}
        """By the number of iterations before them."""
        run = loop.train(options, dataset, on_collect=self._keep)
        assert run.averages.swa is not None
        self.average: nn.Module = run.averages.swa.float()
        if len(self.models) < len(CORNERS):
            raise ValueError(f"SWA took {len(self.models)} models, and a plane needs {len(CORNERS)}: more epochs")
        kept = list(self.models)
        self.corners = dict(zip((kept[0], kept[len(kept) // 2], kept[-1]), CORNERS, strict=True))
        self.plane = WeightPlane(*(self.models[iteration] for iteration in self.corners))
        self.places = {iteration: self.plane.coordinates(model) for iteration, model in self.models.items()}

    def _keep(self, iteration: int, model: nn.Module) -> None:
        self.models[iteration] = copy.deepcopy(model).float()

    def survey(self, images: Images, path: Path, points: int) -> PlaneGrid:
        """The values on a grid around the three models and the average; goes on from the file of an interrupted run."""
        x, y = self.plane.grid(points, include=[self.average])
        different = path.exists() and PlaneGrid(x, y, self.plane.fingerprint).difference(PlaneGrid.load(path))
        if different:
            print(f"{path} is of another run and is made anew: {different}")
            path.unlink()
        model = copy.deepcopy(self.average)
        return self.plane.evaluate(
            model, images.measure, x, y, update_bn_loader=images.statistics, path=path, save_every=5.0, progress=True
        )

    def rows(self, images: Images, command: str) -> list[Row]:
        """Where all models and the average are, and how good."""
        common = environment(torch.device("cpu"), command)
        models = [(self.corners.get(number, ""), number, model) for number, model in self.models.items()]
        rows = []
        for weights, iteration, model in (*models, (AVERAGE, max(self.models), self.average)):
            fastswa.update_bn(images.statistics, model)
            measured, place = images.measure(model), self.plane.coordinates(model)
            rows.append(
                Row(
                    **common,
                    schedule=self.options.swa_schedule,
                    seed=self.options.seed,
                    weights=weights,
                    iteration=iteration,
                    **place._asdict(),
                    training_loss=measured[LOSS],
                    test_error=measured[ERROR],
                )
            )
        return rows


def table(rows: Sequence[Row]) -> str:
    """The models that span the planes, and the averages."""
    lines = [["learning rate", "weights", "x", "y", "off the plane", LOSS, ERROR]]
    for row in rows:
        if row.weights:
            # A zero that was rounded from below would be written -0.00.
            place = [f"{round(value, 2) + 0.0:.2f}" for value in (row.x, row.y, row.distance)]
            lines.append([row.schedule, row.weights, *place, f"{row.training_loss:.4f}", f"{row.test_error:.2f}"])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.rjust, line, widths)) for line in lines)


def draw(path: Path, walks: Sequence[tuple[Walk, PlaneGrid]]) -> None:
    """Draw loss and error of each run, one below the other."""
    # A Figure by itself draws with Agg; pyplot would choose a backend for the whole process.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 8.4), dpi=100, layout="constrained")
    for (walk, grid), column in zip(walks, figure.subplots(2, len(walks), squeeze=False).T, strict=True):
        marked = {name: walk.places[iteration] for iteration, name in walk.corners.items()}
        marked[AVERAGE] = walk.plane.coordinates(walk.average)
        steps = np.array(list(walk.places.values()))
        for axes, value in zip(column, (LOSS, ERROR), strict=True):
            axes.plot(steps[:, 0], steps[:, 1], ".-", color="white", linewidth=0.8, markersize=4)
            plot(grid, value, points=marked, axes=axes)
        column[0].set_title(f"{walk.options.swa_schedule} learning rate, {len(walk.models)} models averaged")
    figure.savefig(path)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (%(default)s)")
    parser.add_argument("--epochs", type=int, default=60, help="of each run (%(default)s)")
    parser.add_argument("--swa-start", type=int, default=46, help="first epoch that is averaged (%(default)s)")
    parser.add_argument("--cycle", type=int, default=0, help="length of a cycle in iterations; default: an epoch")
    parser.add_argument("--points", type=int, default=21, help="of the grid, in a row and in a column (%(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS / "plane", help="folder of the files (%(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Train, find the values, print the table, write and draw."""
    # Enough for so small a network, and the weights are then the same on any number of cores.
    torch.set_num_threads(1)
    output: Path = arguments.output
    command = " ".join(["python -m benchmarks", *sys.argv[1:]])
    # Trained in float64, so that the models do not depend on how a processor rounds; measured in float32.
    given = {"swa": True, "double": True, "seed": arguments.seed}
    given |= {"epochs": arguments.epochs, "swa_start": arguments.swa_start}
    walks, rows = [], []
    try:
        for schedule in SCHEDULES:
            cycle = {"cycle": arguments.cycle} if schedule == "cyclical" else {}
            # No test between epochs: nobody looks at it.
            options = Options.of("digits", **given, **cycle, swa_schedule=schedule, eval_every=arguments.epochs)
            dataset = loop.images_for(options)
            images, walk = Images(replace(dataset, dtype=torch.float32), options), Walk(options, dataset)
            walks.append((walk, walk.survey(images, output / f"{schedule}.npz", arguments.points)))
            rows += walk.rows(images, command)
    except (ValueError, ImportError) as error:
        print(error, file=sys.stderr)
        return 2
    print(table(rows))
    write(output / "models.csv", rows, Row)
    draw(output / "plane.png", walks)
    return 0
