"""The benchmark of training steps checks the averages of real steps, and gives no time to a wrong one."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import step
from benchmarks.__main__ import main
from benchmarks.measure import Times
from benchmarks.networks import GPT2, MLP
from benchmarks.providers import CACHED, OURS, TORCH, Prepared
from benchmarks.record import HEADINGS
from benchmarks.step import Row, measure_case
from benchmarks.training_step import OFFLOAD, OVERLAP, WAYS, WORKS, Training, Work, trainings

CPU = torch.device("cpu")
SGD = partial(torch.optim.SGD, lr=0.1)
PERCEPTRON = Work(
    partial(MLP, 4, 3), lambda: (torch.randn(6, 4), torch.randint(10, (6,))), partial(torch.optim.SGD, lr=0.1)
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    # Two threads on a busy machine wait for one another in every call, and the times do not matter here.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_every_way_is_checked_and_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "step.csv"
    assert main(["step", "--seconds", "0.05", "--output", str(path)]) == 0
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [HEADINGS.get(column.name, column.name) for column in fields(Row)]
    assert [(row["case"], row["provider"]) for row in rows] == [
        ("digits", name) for name in (TORCH, CACHED, OURS, "fastswa WeightAverages")
    ]
    for row in rows:
        assert row["checked"] == "yes"
        assert 0 < float(row["p20_us"]) <= float(row["p50_us"]) <= float(row["p80_us"])
        assert 0 < float(row["share_of_step"]) < 1
        assert float(row["ratio_p20"]) <= float(row[HEADINGS["ratio_to_fastswa"]]) <= float(row["ratio_p80"])
    printed = capsys.readouterr().out
    assert "GPU steps, overlap, averages kept on the CPU: not measured: need a GPU" in printed
    assert all(row["provider"] in printed for row in rows)


def test_what_is_added_on_a_gpu_is_a_difference_of_steps() -> None:
    more, alone = Times([[5.0], [50.0]]), Times([[4.0], [48.0]])
    assert step._less(more, alone).runs == [[1.0], [2.0]]


@pytest.mark.parametrize("name", [OVERLAP, OFFLOAD])
def test_what_a_gpu_measures_averages_right_on_a_cpu(name: str) -> None:
    (training,), verdicts = trainings(PERCEPTRON, CPU, {name: WAYS[name]})[0].values(), {name: "yes"}
    assert trainings(PERCEPTRON, CPU, {name: WAYS[name]})[1] == verdicts
    training.steps(2)


def test_networks_of_a_gpu_take_their_batches() -> None:
    assert list(WORKS["cuda"]) == ["resnet50", "gpt2"]
    text = replace(
        WORKS["cuda"]["gpt2"],
        network=partial(GPT2, 1, 8, 2, 50, 16),
        batch=partial(WORKS["cuda"]["gpt2"].batch.func, 2, 5, 50),
        optimizer=SGD,
    )
    before = Training(text, CPU)
    start = [parameter.detach().clone() for parameter in before.model.parameters()]
    before.step()
    assert not all(map(torch.equal, start, before.model.parameters()))
    images, labels = WORKS["cuda"]["resnet50"].batch.func(2, 3, 8, 1000)
    assert (images.shape, labels.shape) == ((2, 3, 8, 8), (2,))


def late(setup: Callable[[nn.Module], tuple[Prepared, Callable[[], object]]]) -> Callable[..., object]:
    """A way that misses every second update."""

    def wrapped(model: nn.Module) -> tuple[Prepared, Callable[[], object]]:
        ready, wait = setup(model)
        calls = iter(range(1_000_000))
        return replace(ready, update=lambda: None if next(calls) % 2 else ready.update()), wait

    return wrapped


def breaks(model: nn.Module) -> tuple[Prepared, Callable[[], object]]:
    raise RuntimeError("no such average")


def test_a_wrong_average_gets_no_time() -> None:
    ways = {
        OURS: WAYS[OURS],
        CACHED: replace(WAYS[CACHED], setup=late(WAYS[CACHED].setup)),
        TORCH: replace(WAYS[TORCH], setup=breaks),
    }
    rows = {row.provider: row for row in measure_case("mlp", PERCEPTRON, ways, CPU, 0.01, "", rounds=2)}
    assert rows[CACHED].checked.startswith("wrong: 0.weight is off by")
    assert rows[TORCH].checked == "skipped: RuntimeError: no such average"
    assert rows[CACHED].p50_us is rows[TORCH].p50_us is None
    assert rows[OURS].p50_us
    assert "wrong: 0.weight" in step.table(list(rows.values()))


def test_a_wrong_average_of_fastswa_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "WAYS", {OURS: replace(WAYS[OURS], setup=breaks)})
    assert main(["step", "--seconds", "0.01", "--output", str(tmp_path / "step.csv")]) == 1
