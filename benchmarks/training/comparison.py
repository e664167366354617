"""What the methods reached on digits, seed by seed: a table and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from benchmarks import record

EMA_DECAY = 0.99

METHODS = {
    "SGD": ("sgd", "sgd"),
    f"EMA {EMA_DECAY} of SGD": ("sgd", "ema"),
    "SWA, constant rate": ("swa-constant", "swa"),
    "SWA, cyclical rate": ("swa-cyclical", "swa"),
    "SWAG, its samples' mean prediction": ("swa-constant", "swag"),
}
"""The run of each method, and which of its scores is the method's."""

BASELINE = "SGD"


@dataclass(frozen=True)
class Result(record.Environment):
    """What a method reached with a seed.

    Args:
        method: a key of `METHODS`.
        run: a key of `methods.RUNS`.
        seed: of weights, batches and split.
        epochs: of the run.
        test_accuracy: in %, of the test images.
        test_loss: mean cross entropy there.
    """

    method: str
    run: str
    seed: int
    epochs: int
    test_accuracy: float
    test_loss: float


def by_seed(results: Sequence[Result], method: str, quantity: str) -> list[float]:
    """A method's values in the order of the seeds.

    Args:
        results: of all methods.
        method: a key of `METHODS`.
        quantity: a field of `Result`.
    """
    own = {result.seed: getattr(result, quantity) for result in results if result.method == method}
    return [own[seed] for seed in sorted(own)]


def differences(results: Sequence[Result], method: str) -> list[float]:
    """A method's test accuracy less the baseline's, seed by seed.

    Args:
        results: of all methods.
        method: a key of `METHODS`.
    """
    own, baseline = (by_seed(results, name, "test_accuracy") for name in (method, BASELINE))
    return [value - other for value, other in zip(own, baseline, strict=True)]


def table(results: Sequence[Result]) -> str:
    """Means and standard deviations over the seeds, and how they were found.

    Args:
        results: of all methods.
    """
    rows = [["method", "test accuracy in %", "test loss", f"accuracy less {BASELINE}'s"]]
    for method in METHODS:
        accuracy, loss = (by_seed(results, method, quantity) for quantity in ("test_accuracy", "test_loss"))
        paired = differences(results, method)
        gain = "-" if method == BASELINE else f"{mean(paired):+.2f} ± {stdev(paired):.2f}"
        spread = f"{mean(accuracy):.2f} ± {stdev(accuracy):.2f}", f"{mean(loss):.3f} ± {stdev(loss):.3f}"
        rows.append([method, *spread, gain])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    first, seeds = results[0], len(by_seed(results, BASELINE, "seed"))
    lines += [
        f"Means ± standard deviations over {seeds} seeds, each with its own split, after {first.epochs} epochs.",
        hardware(first),
    ]
    return "\n".join(lines)


def hardware(result: Result) -> str:
    """Where a result was found.

    Args:
        result: any of a comparison.
    """
    return f"One thread of {result.cpu}, torch {result.torch}, fastswa {result.fastswa}: {result.command}"


def draw(path: Path, results: Sequence[Result]) -> None:
    """Draw every seed's accuracies, and their differences from the baseline's, with means and deviations.

    Args:
        path: of the picture.
        results: of all methods.
    """
    # A Figure by itself draws with Agg; pyplot would choose a backend for the whole process.
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the picture needs matplotlib: pip install fastswa[demo]") from error

    figure = Figure(figsize=(9, 3.6), dpi=140, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for height, method in enumerate(METHODS):
        paired = [] if method == BASELINE else differences(results, method)
        for axes, values in ((left, by_seed(results, method, "test_accuracy")), (right, paired)):
            if values:
                axes.plot(values, [height] * len(values), "o", color="tab:blue", alpha=0.45, markersize=5)
                axes.errorbar(
                    mean(values), height - 0.2, xerr=stdev(values), fmt="D", color="black", markersize=4, capsize=3
                )
    left.set_yticks(range(len(METHODS)), list(METHODS))
    left.set(xlabel="test accuracy in %", ylim=(len(METHODS) - 0.5, -0.6))
    right.set(xlabel=f"less {BASELINE}'s with the same seed, in points")
    right.axvline(0, color="0.4", linewidth=0.8)
    for axes in (left, right):
        axes.grid(axis="x", alpha=0.3)
    seeds = len(by_seed(results, BASELINE, "seed"))
    title = f"Digits, 160 training images, {results[0].epochs} epochs each: {seeds} seeds, mean ± standard deviation"
    figure.suptitle(title, fontsize=11)
    figure.supxlabel(hardware(results[0]), fontsize=7, color="0.4")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
