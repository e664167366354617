"""Trains a small ResNet on scikit-learn's digits by SGD, with SWA and with an EMA of the weights, and compares them.

For each seed the three have the same start, the same batches and the same number of epochs:

- SGD: momentum and a cosine schedule down to zero. Its result is the plain model at the end.
- SWA: the same for the first `SWA_START` of the epochs, then a constant rate. Its result is the equal average of the
  weights that each later epoch ends with.
- EMA: its result is the exponential average over all steps of the SGD run. It rides along in that run, for averaging
  changes nothing in the training: a run of its own would train the same model.

update_bn recomputes an average's BatchNorm statistics before it is used. Beside fastswa's EMA, torch's AveragedModel
takes the same one: both must agree, and the time of each is compared with that of a training step.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from torch.optim import SGD, Optimizer, swa_utils
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm import tqdm

import fastswa
from benchmarks.networks import PreActivationResNet
from benchmarks.record import RESULTS, cpu_name

TRAINING_IMAGES = 160
"""About sixteen of each digit, so that there is something left to gain; the other 1637 images are the test set."""

BATCH, LEARNING_RATE = 16, 0.1
SWA_START, SWA_LEARNING_RATE, ANNEAL_EPOCHS = 0.7, 0.05, 5
EMA_DECAY = 0.99

ALLOWED_ULPS = 4
"""Between fastswa's and torch's EMA, in float32 units in the last place of the tensor's largest value.

Both compute a + w (p - a), but a processor's loop may fuse the multiplication with the addition, or round in between.
Now and then that turns the last bit, in either direction, and the EMA forgets it. A missed update shows in thousands.
"""

Measured = defaultdict[str, list[float]]
"""From all SGD runs: seconds of each "step", of each update by "fastswa" and "torch", and their distances in "ulps"."""

PLAIN, BEFORE, AFTER = "plain model", "average before update_bn", "average after update_bn"


class Digits:
    """The images, one channel in [0, 1], and their labels, split the same way every time."""

    def __init__(self) -> None:
        images, labels = load_digits(return_X_y=True)
        images = (images / 16).astype("float32").reshape(-1, 1, 8, 8)
        parts = train_test_split(images, labels, train_size=TRAINING_IMAGES, stratify=labels, random_state=0)
        self.training_images, self.test_images, self.training_labels, self.test_labels = map(torch.from_numpy, parts)


class Batches:
    """Passes through the training images, each in a new order and with every image shifted by up to a pixel."""

    def __init__(self, digits: Digits, seed: int) -> None:
        padded = pad(digits.training_images, (1, 1, 1, 1))
        self.shifted, self.labels = padded.unfold(2, 8, 1).unfold(3, 8, 1), digits.training_labels
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for index in torch.randperm(len(self.labels), generator=self.generator).split(BATCH):
            down, right = torch.randint(3, (2, len(index)), generator=self.generator)
            yield self.shifted[index, :, down, right], self.labels[index]


class Point(NamedTuple):
    """A point of a learning curve: which weights were tested, and the share of the test images they got right, in %."""

    method: str
    weights: str
    seed: int
    epoch: int
    learning_rate: float
    test_accuracy: float


def start(seed: int) -> tuple[nn.Module, Optimizer]:
    """The model and the optimizer that all methods start with."""
    torch.manual_seed(seed)
    model = PreActivationResNet()
    return model, SGD(model.parameters(), LEARNING_RATE, momentum=0.9, weight_decay=5e-4, nesterov=True)


def swa_start(epochs: int) -> int:
    """The number of epochs before SWA's average begins."""
    return int(SWA_START * epochs)


def training_step(model: nn.Module, optimizer: Optimizer, images: Tensor, labels: Tensor) -> None:
    """One step of gradient descent."""
    optimizer.zero_grad()
    cross_entropy(model(images), labels).backward()
    optimizer.step()


@torch.inference_mode()
def accuracy(model: nn.Module, digits: Digits) -> float:
    """The share of the test images that a model gets right, in %."""
    model.eval()
    right = torch.cat([model(images).argmax(1) for images in digits.test_images.split(128)]) == digits.test_labels
    model.train()
    return 100 * right.double().mean().item()


def seconds(function: Callable[..., object], *arguments: object) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def distance(ours: nn.Module, theirs: nn.Module) -> float:
    """How far two averages differ, buffers included, in the unit of `ALLOWED_ULPS`; AssertionError if farther."""
    worst = 0.0
    for (name, value), (other, expected) in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
        ulp = torch.finfo(torch.float32).eps * expected.abs().max().double().clamp_min(1e-30)
        ulps = float((value.double() - expected.double()).abs().max() / ulp)
        # Negated, so that NaN is refused too.
        if name != other or not ulps <= ALLOWED_ULPS:
            raise AssertionError(f"fastswa's average differs from torch's in {name!r} by {ulps:.3g} ulp")
        worst = max(worst, ulps)
    return worst


def train_sgd(seed: int, digits: Digits, epochs: int, measured: Measured) -> Iterator[Point]:
    """SGD with a cosine schedule, and the EMA of its weights."""
    model, optimizer = start(seed)
    # update_bn has batches of its own, so that the training's random numbers do not depend on it.
    batches, statistics_batches = Batches(digits, seed), Batches(digits, seed)
    scheduler = CosineAnnealingLR(optimizer, T_max=epochs)
    ema_model = fastswa.AveragedModel(model, multi_avg_fn=fastswa.get_ema_multi_avg_fn(EMA_DECAY))
    torch_ema_model = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(EMA_DECAY))
    averages = [("fastswa", ema_model), ("torch", torch_ema_model)]
    for epoch in range(1, epochs + 1):
        rate = optimizer.param_groups[0]["lr"]
        for images, labels in batches:
            measured["step"].append(seconds(training_step, model, optimizer, images, labels))
            for name, average in averages:
                measured[name].append(seconds(average.update_parameters, model))
            # They take turns at being second, which finds the model's weights in the cache.
            averages.reverse()
        scheduler.step()
        measured["ulps"].append(distance(ema_model, torch_ema_model))
        yield Point("SGD", PLAIN, seed, epoch, rate, accuracy(model, digits))
        yield Point("EMA", BEFORE, seed, epoch, rate, accuracy(ema_model, digits))
        fastswa.update_bn(statistics_batches, ema_model)
        yield Point("EMA", AFTER, seed, epoch, rate, accuracy(ema_model, digits))


def train_swa(seed: int, digits: Digits, epochs: int) -> Iterator[Point]:
    """SGD with the same schedule, then with a constant rate and the equal average of the weights."""
    model, optimizer = start(seed)
    batches, statistics_batches = Batches(digits, seed), Batches(digits, seed)
    scheduler = CosineAnnealingLR(optimizer, T_max=epochs)
    swa_scheduler = fastswa.SWALR(optimizer, swa_lr=SWA_LEARNING_RATE, anneal_epochs=ANNEAL_EPOCHS)
    swa_model = fastswa.AveragedModel(model)
    for epoch in range(1, epochs + 1):
        rate = optimizer.param_groups[0]["lr"]
        for images, labels in batches:
            training_step(model, optimizer, images, labels)
        yield Point("SWA", PLAIN, seed, epoch, rate, accuracy(model, digits))
        if epoch <= swa_start(epochs):
            scheduler.step()
            continue
        swa_scheduler.step()
        swa_model.update_parameters(model)
        yield Point("SWA", BEFORE, seed, epoch, rate, accuracy(swa_model, digits))
        fastswa.update_bn(statistics_batches, swa_model)
        yield Point("SWA", AFTER, seed, epoch, rate, accuracy(swa_model, digits))


def curve(points: Sequence[Point], method: str, weights: str) -> tuple[np.ndarray, np.ndarray]:
    """The test accuracies of some weights by epoch: mean and standard deviation (NaN for one seed) over the seeds."""
    accuracies: dict[int, list[float]] = {}
    for point in points:
        if (point.method, point.weights) == (method, weights):
            accuracies.setdefault(point.epoch, []).append(point.test_accuracy)
    values = np.array(list(accuracies.values()))
    return values.mean(1), values.std(1, ddof=1) if values.shape[1] > 1 else np.full(len(values), np.nan)


def table(points: Sequence[Point], epochs: int, measured: Measured, hardware: str) -> str:
    """What each method reached in the last epoch, what the averaging costs, and how both were found."""

    def last(method: str, *kinds: str) -> list[str]:
        return ["{:.2f} ± {:.2f}".format(*(values[-1] for values in curve(points, method, kind))) for kind in kinds]

    step, ours, theirs = (1000 * median(measured[name]) for name in ("step", "fastswa", "torch"))
    shares = [f"{100 * update / (step + update):.1f} %" for update in (ours, theirs)]
    rows = [
        ["method", PLAIN, BEFORE, AFTER, "fastswa's share", "torch's share"],
        ["SGD", *last("SGD", PLAIN), "-", "-", "-", "-"],
        [f"SWA from epoch {swa_start(epochs) + 1}", *last("SWA", PLAIN, BEFORE, AFTER), "-", "-"],
        [f"EMA {EMA_DECAY}", *last("SGD", PLAIN), *last("EMA", BEFORE, AFTER), *shares],
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    seeds, ulps = points[-1].seed + 1, max(measured["ulps"])
    lines += [
        f"Test accuracy in %, mean ± deviation over {seeds} seeds, after {epochs} epochs. SGD's result is the plain",
        "model, SWA's and EMA's is the average after update_bn. EMA's plain model is the SGD run's.",
        f"Share of a step that averages: training {step:.3f} ms, update_parameters {ours:.3f} ms with fastswa and",
        f"{theirs:.3f} ms with torch (medians, {hardware}).",
        f"The two averages differ by {ulps:.2g} ulp of a tensor's largest value at most; {ALLOWED_ULPS} are allowed.",
    ]
    return "\n".join(lines)


def draw(path: Path, points: Sequence[Point], epochs: int, hardware: str) -> None:
    """Draw the test accuracies, and below them the learning rates, against the epochs."""
    # A Figure by itself draws with Agg; pyplot would choose a backend for the whole process.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), dpi=140, layout="constrained")
    upper, lower = figure.subplots(2, sharex=True, height_ratios=(4, 1))
    constant = epochs - swa_start(epochs)
    seen: list[float] = []
    for method, weights, shown, colour, style, label in [
        ("SGD", PLAIN, epochs, "black", "-", "SGD: plain model"),
        ("SWA", PLAIN, constant, "tab:blue", ":", "SWA: plain model (before the line, SGD's)"),
        ("EMA", AFTER, epochs, "tab:orange", "-", f"EMA {EMA_DECAY} of SGD: average after update_bn"),
        ("SWA", AFTER, constant, "tab:blue", "-", "SWA: average after update_bn"),
    ]:
        mean, deviation = (values[-shown:] for values in curve(points, method, weights))
        epoch = np.arange(epochs - shown, epochs) + 1
        upper.plot(epoch, mean, style, color=colour, label=label)
        upper.fill_between(epoch, mean - deviation, mean + deviation, color=colour, alpha=0.12, linewidth=0)
        seen += mean[-constant:].tolist()
    # Fit to the last part; the curves' rise from chance may leave the picture.
    upper.set(ylim=(min(seen) - 1, max(seen) + 1), ylabel="test accuracy in %")
    for method, colour in (("SWA", "tab:blue"), ("SGD", "black")):
        rates = {point.epoch: point.learning_rate for point in points if point.method == method}
        lower.plot(list(rates), list(rates.values()), color=colour)
    lower.set(ylim=(0, None), xlim=(0.5, epochs + 0.5), xlabel="epoch", ylabel="learning rate")
    for axes in (upper, lower):
        axes.axvline(swa_start(epochs) + 0.5, color="tab:blue", linewidth=0.8, linestyle="--")
        axes.grid(alpha=0.3)
    seeds = points[-1].seed + 1
    title = f"Digits, {TRAINING_IMAGES} training images, {epochs} epochs each: mean ± deviation over {seeds} seeds"
    figure.legend(loc="outside upper center", ncols=2, frameon=False, title=title, title_fontsize=11)
    figure.supxlabel(hardware, fontsize=7, color="0.4")
    figure.savefig(path)


def write(path: Path, points: Sequence[Point]) -> None:
    """Write the curves as CSV, a line for each point."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Point._fields)
        for point in points:
            writer.writerow(f"{value:.5g}" if isinstance(value, float) else value for value in point)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--seeds", type=int, default=5, help="repetitions, with seeds 0, 1, ... (%(default)s)")
    parser.add_argument("--epochs", type=int, default=60, help="of each run (%(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS / "demo", help="folder of the curves (%(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Train, print the table, write and draw the curves."""
    seeds, epochs, output = arguments.seeds, arguments.epochs, arguments.output
    # Enough for so small a network, and the accuracies are then the same on any number of cores.
    torch.set_num_threads(1)
    digits, measured = Digits(), Measured(list)
    points: list[Point] = []
    with tqdm(total=seeds * 2 * epochs, unit="epoch") as bar:
        for seed in range(seeds):
            for point in chain(train_sgd(seed, digits, epochs, measured), train_swa(seed, digits, epochs)):
                points.append(point)
                if point.weights == PLAIN:
                    bar.set_postfix(seed=seed, run=point.method, epoch=point.epoch, test=f"{point.test_accuracy:.1f} %")
                    bar.update()
    hardware = f"one thread of {cpu_name()}, torch {torch.__version__}, fastswa {fastswa.__version__}"
    print(table(points, epochs, measured, hardware))
    output.mkdir(parents=True, exist_ok=True)
    write(output / "learning_curves.csv", points)
    draw(output / "learning_curves.png", points, epochs, hardware)
    return 0
