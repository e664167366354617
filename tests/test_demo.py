"""The demo trains, and prints, writes and draws what it found."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread
from torch import nn
from torch.optim import swa_utils

import fastswa
from benchmarks import demo
from benchmarks.__main__ import main
from benchmarks.demo import AFTER, BEFORE, PLAIN


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """The demo runs in one thread; the other tests keep theirs."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_the_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "demo"
    assert main(["demo", "--seeds", "1", "--epochs", "3", "--output", str(output)]) == 0

    heading, *table = capsys.readouterr().out.splitlines()[:4]
    assert re.split(r"\s{2,}", heading)[:4] == ["method", PLAIN, BEFORE, AFTER]
    accuracies = {line[:3]: [float(value) for value in re.findall(r"(\S+) ±", line)] for line in table}
    shares = [float(value) for value in re.findall(r"(\S+) %", table[2])]
    assert {method: len(values) for method, values in accuracies.items()} == {"SGD": 1, "SWA": 3, "EMA": 3}
    assert len(shares) == 2
    assert all(0 <= value <= 100 for value in chain(*accuracies.values(), shares))

    with (output / "learning_curves.csv").open(newline="") as file:
        curves: dict[tuple[str, str], list[float]] = {}
        for row in csv.DictReader(file):
            curves.setdefault((row["method"], row["weights"]), []).append(float(row["test_accuracy"]))
    # Of three epochs SWA averages the last one.
    epochs = {("SGD", PLAIN): 3, ("EMA", BEFORE): 3, ("EMA", AFTER): 3}
    epochs |= {("SWA", PLAIN): 3, ("SWA", BEFORE): 1, ("SWA", AFTER): 1}
    assert {key: len(values) for key, values in curves.items()} == epochs
    assert accuracies["SWA"] == pytest.approx([curves["SWA", kind][-1] for kind in (PLAIN, BEFORE, AFTER)], abs=0.01)
    assert curves["SWA", PLAIN][:2] == curves["SGD", PLAIN][:2]
    assert curves["SWA", BEFORE] == curves["SWA", PLAIN][2:], "an average of one model is that model"

    picture = output / "learning_curves.png"
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert picture.stat().st_size < 300_000
    assert imread(picture).std() > 0


@pytest.mark.parametrize("change", [1e-4, float("nan")])
@torch.no_grad()
def test_averages_that_differ_are_refused(change: float) -> None:
    model = nn.BatchNorm1d(4)
    ours = fastswa.AveragedModel(model)
    assert demo.distance(ours, swa_utils.AveragedModel(model)) == 0
    model.weight[2] += change
    with pytest.raises(AssertionError, match=r"module\.weight"):
        demo.distance(ours, swa_utils.AveragedModel(model))
