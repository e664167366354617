"""The comparison of methods on digits: every number in its table, file and picture is a run's."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread

from benchmarks import methods, record
from benchmarks.__main__ import main
from benchmarks.training import comparison
from benchmarks.training.comparison import BASELINE, METHODS, Result
from benchmarks.training.evaluation import score_of
from benchmarks.training.loop import images_for, train
from benchmarks.training.options import Options


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """The command runs in one thread; the other tests keep theirs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def result(method: str, seed: int, accuracy: float) -> Result:
    fields = {"timestamp": "", "device": "cpu", "cpu": "a CPU", "threads": 1, "command": "a command", "fastswa": "1"}
    environment = {**fields, "torch": "2", "triton": "3", "python": "3"}
    run = METHODS[method][0]
    return Result(**environment, method=method, run=run, seed=seed, epochs=7, test_accuracy=accuracy, test_loss=0.5)


RESULTS = [
    result(method, seed, accuracy)
    # Differences from SGD's: 1, 2 and 6, whatever the order of the seeds.
    for method, pairs in {
        method: [(0, 90.0), (1, 80.0), (2, 70.0)] if method == BASELINE else [(2, 76.0), (0, 91.0), (1, 82.0)]
        for method in METHODS
    }.items()
    for seed, accuracy in pairs
]


def test_every_method_and_seed_is_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "results"
    assert main(["methods", "--seeds", "2", "--epochs", "2", "--output", str(output)]) == 0
    heading, *lines = capsys.readouterr().out.splitlines()
    assert re.split(r"\s{2,}", heading) == ["method", "test accuracy in %", "test loss", "accuracy less SGD's"]

    with (output / "digits-cpu.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted((row["method"], row["seed"]) for row in rows) == sorted(
        (name, seed) for name in METHODS for seed in "01"
    )
    for row in rows:
        assert row["command"] == "python -m benchmarks methods --seeds 2 --epochs 2"
        assert (row["epochs"], row["threads"], row["torch"]) == ("2", "1", torch.__version__)
    accuracies = {
        name: np.array([float(row["test_accuracy"]) for row in rows if row["method"] == name]) for name in METHODS
    }
    for line, name in zip(lines, METHODS, strict=False):
        shown = [float(value) for value in re.findall(r"[+-]?\d+\.\d+", line.removeprefix(name))]
        paired = accuracies[name] - accuracies[BASELINE]
        expected = [accuracies[name].mean(), accuracies[name].std(ddof=1), paired.mean(), paired.std(ddof=1)]
        # The file has four digits, the table two decimals.
        assert shown[:2] + shown[4:] == pytest.approx(expected[: len(shown) - 2], abs=0.02)

    # A run of its own, with the options of the method and nothing that rides along.
    options = Options.of("digits", epochs=2, seed=1, swa=True, swa_start=1, swa_schedule="cyclical", double=True)
    expected = train(options, images_for(options)).scores["swa"].accuracy
    assert accuracies["SWA, cyclical rate"][1] == pytest.approx(expected, abs=0.01)

    picture = output / "digits.png"
    assert picture.stat().st_size < 300_000
    assert imread(picture).std() > 0


def committed() -> list[Result]:
    with (record.RESULTS / "digits-cpu.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    numbers = {"threads": int, "seed": int, "epochs": int, "test_accuracy": float, "test_loss": float}
    return [Result(**{key: numbers.get(key, str)(value) for key, value in row.items()}) for row in rows]


def test_the_command_gives_the_committed_numbers() -> None:
    """A seed again: float64, so that it does not matter on which processor."""
    first = committed()[0]
    for found in methods.trained("sgd", first.seed, first.epochs, first.command):
        expected = next(each for each in committed() if (each.method, each.seed) == (found.method, found.seed))
        # The file has four digits.
        assert found.test_accuracy == pytest.approx(expected.test_accuracy, abs=0.006)
        assert found.test_loss == pytest.approx(expected.test_loss, abs=6e-5)


def test_what_rides_along_changes_nothing() -> None:
    alone = Options.of("digits", epochs=2, swa=True, swa_start=1)
    dataset = images_for(alone)
    runs = [train(options, dataset) for options in (alone, replace(alone, swag=True, swag_samples=3, ema_decay=0.9))]
    assert list(runs[1].scores) == ["sgd", "swa", "ema", "swag"]
    for name in ("sgd", "swa"):
        assert runs[0].scores[name] == runs[1].scores[name]
    for name, tensor in runs[0].model.state_dict().items():
        assert torch.equal(tensor, runs[1].model.state_dict()[name]), name


def test_means_deviations_and_paired_differences() -> None:
    lines = comparison.table(RESULTS).splitlines()
    assert re.split(r"\s{2,}", lines[1]) == ["SGD", "80.00 ± 10.00", "0.500 ± 0.000", "-"]
    for line in lines[2 : len(METHODS) + 1]:
        # 1, 2 and 6: mean 3, deviation sqrt((4 + 1 + 9) / 2). 91, 82 and 76: mean 83, sqrt((64 + 1 + 49) / 2).
        assert re.split(r"\s{2,}", line)[1:] == ["83.00 ± 7.55", "0.500 ± 0.000", "+3.00 ± 2.65"]
    assert lines[-2] == "Means ± standard deviations over 3 seeds, each with its own split, after 7 epochs."
    assert lines[-1] == "One thread of a CPU, torch 2, fastswa 1: a command"


def test_the_picture_shows_every_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: drawn.append(figure))
    comparison.draw(tmp_path / "picture.png", RESULTS)
    left, right = drawn[0].axes
    assert [label.get_text() for label in left.get_yticklabels()] == list(METHODS)
    for axes, wanted in ((left, [[90.0, 80.0, 70.0], *[[91.0, 82.0, 76.0]] * 4]), (right, [[1.0, 2.0, 6.0]] * 4)):
        clouds = [line for line in axes.lines if line.get_marker() == "o"]
        assert [list(line.get_xdata()) for line in clouds] == wanted
        means = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "D"]
        assert means == pytest.approx([np.mean(values) for values in wanted])
    heights = [set(line.get_ydata()) for line in right.lines if line.get_marker() == "o"]
    assert heights == [{1}, {2}, {3}, {4}]


def test_too_few_to_compare(capsys: pytest.CaptureFixture[str]) -> None:
    for few in (["--seeds", "1"], ["--epochs", "1"]):
        assert main(["methods", *few]) == 2
        assert "at least 2 seeds" in capsys.readouterr().err


def test_the_score_of_probabilities() -> None:
    scores, labels = torch.randn(50, 4, dtype=torch.float64), torch.randint(4, (50,))
    found = score_of(scores.softmax(1), labels)
    assert found.loss == pytest.approx(torch.nn.functional.cross_entropy(scores, labels).item(), rel=1e-12)
    assert found.accuracy == pytest.approx(
        2 * sum(int(row.argmax() == label) for row, label in zip(scores, labels, strict=True))
    )


def test_the_methods_are_runs() -> None:
    assert {run for run, _ in METHODS.values()} == set(methods.RUNS)
