"""A training run that stopped, in whatever way, goes on bit for bit, and never as another run."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import networks
from benchmarks.__main__ import main
from benchmarks.training import checkpoint, log
from benchmarks.training.loop import images_for, train
from benchmarks.training.options import Options
from benchmarks.training.run import Run


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # The number of threads decides how sums are split up, and so their last bits.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def same(one: Any, other: Any) -> bool:
    """Whether two nested states are equal, tensors bit for bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, Tensor):
        # torch.equal takes -0 for 0.
        return (
            one.dtype == other.dtype and one.shape == other.shape and one.numpy().tobytes() == other.numpy().tobytes()
        )
    return bool(one == other)


def without_times(state: dict[str, Any]) -> dict[str, Any]:
    return {**state, "rows": [{**row, "seconds": 0} for row in state["rows"]]}


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return [{**row, "seconds": ""} for row in csv.DictReader(file)]


class WithDropout(nn.Sequential):
    """A network that draws random numbers while it trains."""

    def __init__(self, classes: int, channels: int) -> None:
        super().__init__()
        self.append(nn.Flatten()).append(nn.Linear(64 * channels, 16)).append(nn.BatchNorm1d(16))
        self.append(nn.Dropout()).append(nn.Linear(16, classes))


@pytest.mark.parametrize("schedule", ["constant", "cyclical"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schedule: str) -> None:
    monkeypatch.setitem(networks.TRAINED, "digits", WithDropout)
    others = {"cycle": 7} if schedule == "cyclical" else {"swag": True, "swag_rank": 2, "swag_samples": 2}
    options = Options.of("digits", epochs=5, ema_decay=0.9, swa=True, swa_start=2, swa_schedule=schedule, **others)
    dataset = images_for(options)
    uninterrupted = train(options, dataset, output=tmp_path / "whole")

    def stop(iteration: int, model: nn.Module) -> None:
        if iteration > 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(options, dataset, output=tmp_path / "parts", save_every=2, on_collect=stop)
    state = checkpoint.load(tmp_path / "parts" / checkpoint.NAME)
    assert state["epoch"] == 2
    begun = Run(options, dataset)
    begun.load_state_dict(state)
    assert torch.equal(torch.get_rng_state(), state["random"])
    # What else draws from torch's generator does not matter.
    torch.rand(7)
    resumed = train(options, dataset, output=tmp_path / "parts", save_every=2, resume=state)
    assert same(without_times(resumed.state_dict()), without_times(uninterrupted.state_dict()))
    whole, parts = (rows_of(tmp_path / name / log.NAME) for name in ("whole", "parts"))
    assert [row["epoch"] for row in parts] == ["1", "2", "3", "4", "5"]
    assert parts == whole

    with pytest.raises(ValueError, match="of another run: seed is 0 in the checkpoint and 1 here"):
        train(replace(options, seed=1), dataset, resume=state)


KILLED = """
import os, signal, sys
from pathlib import Path
from benchmarks.training import loop
from benchmarks.training.options import Options

def kill(iteration, model):
    if iteration == 38:
        print("killed at iteration", iteration, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

options = Options.of("digits", epochs=6, ema_decay=0.9, swa=True, swa_start=2, swa_schedule="cyclical", cycle=7)
loop.train(options, loop.images_for(options), output=Path(sys.argv[1]), save_every=2, on_collect=kill)
"""


def test_a_run_killed_in_mid_epoch_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # An epoch has ten iterations; the models are collected at 17, 24, 31, 38: the last one is inside the fourth epoch.
    folder = tmp_path / "killed"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(folder)], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert killed.stdout == "killed at iteration 38\n"
    # The log went on to the third epoch, the checkpoint is the second's.
    assert [row["epoch"] for row in rows_of(folder / log.NAME)] == ["1", "2", "3"]
    assert checkpoint.load(folder / checkpoint.NAME)["epoch"] == 2

    assert main(["train", "--resume", str(folder), "--save-every", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:8]] == ["epoch", "1", "2", "3", "4", "5", "6"]
    assert len({len(line) for line in lines[1:8]}) == 1, "the columns are aligned"
    options = Options(**checkpoint.load(folder / checkpoint.NAME)["options"])
    whole = train(options, images_for(options), output=tmp_path / "whole")
    resumed = checkpoint.load(folder / checkpoint.NAME)
    assert same(without_times(resumed), without_times(whole.state_dict()))
    assert rows_of(folder / log.NAME) == rows_of(tmp_path / "whole" / log.NAME)
    assert sorted(os.listdir(folder)) == [checkpoint.NAME, log.NAME]


def test_the_command_refuses_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    first = ["train", "--epochs", "1", "--batch-size", "80", "--output", str(folder)]
    assert main(first) == 0
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    capsys.readouterr()
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes(before[checkpoint.NAME][:1000])
    other = tmp_path / "other.pt"
    torch.save({"weights": torch.zeros(1)}, other)
    for arguments, words in (
        (first, "holds a run already: --resume"),
        (["train", "--resume", str(folder), "--batch-size", "16"], "batch_size is 80 in the checkpoint and 16 here"),
        (["train", "--resume", str(folder), "--swa"], "swa is False in the checkpoint and True here"),
        (["train", "--resume", str(folder), "--output", str(tmp_path)], "output is"),
        (["train", "--resume", str(tmp_path / "nowhere")], "there is no checkpoint"),
        (["train", "--resume", str(damaged)], f"{damaged} can't be read: "),
        (["train", "--resume", str(other)], "is no checkpoint of a run: there is no 'options' in it"),
        (["train", "--swag"], "swag means nothing without swa"),
        (["train", "--save-every", "0"], "save_every must be at least 1"),
        (["train", "--dataset", "cifar10", "--data-path", str(tmp_path)], "cifar-10-batches-py"),
    ):
        assert main(arguments) == 2
        assert words in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    # What agrees with the checkpoint may be said again.
    assert main(["train", "--resume", str(folder), "--batch-size", "80"]) == 0


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    checkpoint.replace_file(path, lambda file: file.write(b"old"))

    def fail(file: Any) -> None:
        file.write(b"ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoint.replace_file(path, fail)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
