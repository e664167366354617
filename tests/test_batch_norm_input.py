"""What loaders and models can bring along: batches of every structure, odd sizes, layers in odd states."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Iterator
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel
from torch.optim import swa_utils
from torch.utils.data import DataLoader, IterableDataset

import fastswa
from fastswa.batch_norm.batches import move
from tests.batch_norm import (
    Net,
    Perceptron,
    Residual,
    assert_buffers_equal,
    assert_statistics_close,
    assert_unchanged,
    batches,
    breaking,
    state,
    statistics,
    trained,
)

ENGINES = ("eager", "merge")


def test_a_model_without_batch_norm_reads_no_data() -> None:
    report = fastswa.update_bn(breaking(ValueError("read")), nn.Linear(2, 2))
    assert (report.batches, report.layers, report.never_called) == (0, (), ())
    fastswa.update_bn(breaking(ValueError("read")), nn.BatchNorm1d(2, track_running_stats=False))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.norm(left + right)


Pair = namedtuple("Pair", "left right")


@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize("engine", ENGINES)
def test_mappings_become_keyword_arguments(device: str | None, engine: str) -> None:
    pairs = [Pair(torch.randn(8, 3), torch.randn(8, 3)) for _ in range(3)]
    model, expected = TwoInputs(), nn.Sequential(nn.BatchNorm1d(3))
    swa_utils.update_bn([pair.left + pair.right for pair in pairs], expected)
    report = fastswa.update_bn([pair._asdict() for pair in pairs], model, device, engine=engine)
    # The merge rounds once, torch's cumulative average a few times.
    assert_statistics_close(model, statistics(expected), 0 if engine == "eager" else 1e-6)
    assert report.samples == 24


def test_forward_decides_how_the_model_is_called() -> None:
    pairs = [Pair(torch.randn(8, 3), torch.randn(8, 3)) for _ in range(3)]
    model, expected = TwoInputs(), TwoInputs()
    fastswa.update_bn([pair._asdict() for pair in pairs], expected)
    fastswa.update_bn(pairs, model, "cpu", forward=lambda model, batch: model(batch.left, batch.right))
    assert_buffers_equal(model, expected)
    with pytest.raises(TypeError) as caught:
        fastswa.update_bn(pairs, model)
    assert any("forward=" in note for note in caught.value.__notes__)


def test_batches_move_whatever_their_structure() -> None:
    class Movable:
        def to(self, device: object) -> str:
            return f"moved to {device}"

    batch = {"pair": Pair(torch.zeros(2), [torch.ones(1), 5]), "name": "digits", "own": Movable()}
    moved = move(batch, lambda part: part.to("meta"))
    assert isinstance(moved["pair"], Pair)
    assert moved["pair"].left.is_meta
    assert moved["pair"].right[0].is_meta
    assert (moved["pair"].right[1], moved["name"], moved["own"]) == (5, "digits", "moved to meta")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("sweeps", [0, 2])
def test_single_samples_can_be_skipped(engine: str, sweeps: int) -> None:
    model = trained(Residual())
    expected = deepcopy(model)
    data = batches(4)
    fastswa.update_bn(data, expected, engine=engine, sweeps=sweeps)
    report = fastswa.update_bn(
        [data[0], torch.zeros(1, 1, 5, 5), *data[1:]], model, on_singleton="skip", engine=engine, sweeps=sweeps
    )
    assert report.batches == 4
    assert_buffers_equal(model, expected)


def test_a_single_sample_is_explained() -> None:
    with pytest.raises(ValueError, match="more than 1 value") as caught:
        fastswa.update_bn(batches(4, last=1), trained(Perceptron()))
    assert any("on_singleton='skip'" in note for note in caught.value.__notes__)


def test_empty_batches() -> None:
    empty = torch.zeros(0, 1, 5, 5)
    data = batches(3)
    ours = trained(Residual())
    theirs, merged, weighted, expected = (deepcopy(ours) for _ in range(4))
    fastswa.update_bn([data[0], empty, *data[1:]], ours)
    swa_utils.update_bn([data[0], empty, *data[1:]], theirs)
    # Torch counts the batch, so its average is off; called as torch's, ours is the same.
    assert_buffers_equal(ours, theirs)
    for model, options in ((merged, {"engine": "merge"}), (weighted, {"estimator": "weighted"})):
        expected = deepcopy(theirs)
        fastswa.update_bn(data, expected, **options)
        fastswa.update_bn([data[0], empty, *data[1:]], model, **options)
        assert_buffers_equal(model, expected)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_layer_that_no_batch_reaches_keeps_its_statistics(engine: str) -> None:
    model = trained(Net())
    model.unused = nn.BatchNorm1d(4)
    model.unused.running_mean.fill_(3)
    with pytest.warns(UserWarning, match="no batch reached unused; their statistics are kept"):
        report = fastswa.update_bn(batches(), model, engine=engine)
    assert report.never_called == ("unused",)
    assert "unused" not in report.layers
    assert (model.unused.running_mean == 3).all()
    assert int(model.unused.num_batches_tracked) == 0


def test_a_layer_that_only_some_batches_reach() -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.always, self.sometimes = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.always(self.sometimes(x) if x.mean() > 0 else x)

    data = [torch.randn(8, 3) + (-1) ** number for number in range(6)]
    eager, merged, theirs = Sometimes(), Sometimes(), Sometimes()
    swa_utils.update_bn(data, theirs)
    fastswa.update_bn(data, eager)
    fastswa.update_bn(data, merged, engine="merge")
    assert int(merged.sometimes.num_batches_tracked) == 3
    assert_buffers_equal(eager, theirs)
    # A few float32 roundings in torch's own cumulative average.
    assert_statistics_close(merged, statistics(theirs), 1e-6)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("sweeps", [0, 2])
def test_a_layer_that_the_model_keeps_frozen_goes_on_with_its_own_statistics(engine: str, sweeps: int) -> None:
    class Frozen(nn.Sequential):
        def train(self, mode: bool = True) -> nn.Module:
            super().train(mode)
            self[0].eval()
            return self

    model = Frozen(nn.BatchNorm1d(3), nn.BatchNorm1d(3)).train()
    check_frozen(model, lambda data: fastswa.update_bn(data, model, engine=engine, sweeps=sweeps), sweeps)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("sweeps", [0, 2])
def test_layers_that_are_left_out_normalise_with_their_own_statistics(engine: str, sweeps: int) -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))

    def update(data: list[Tensor]) -> None:
        report = fastswa.update_bn(data, model, layers=lambda name, layer: name == "1", engine=engine, sweeps=sweeps)
        assert report.layers == ("1",)

    check_frozen(model, update, sweeps)


def check_frozen(model: nn.Sequential, update: Callable[[list[Tensor]], object], sweeps: int) -> None:
    model[0].running_mean.fill_(5)
    model[0].running_var.fill_(9)
    data = [torch.randn(20, 3) for _ in range(4)]
    modes = [part.training for part in model]
    update(data)
    assert (model[0].running_mean == 5).all()
    assert [part.training for part in model] == modes
    seen = [(batch.double() - 5) / (9 + model[0].eps) ** 0.5 for batch in data]
    var = torch.cat(seen).var(0, correction=0) if sweeps else torch.stack([batch.var(0) for batch in seen]).mean(0)
    # Four float32 batches of values near -5/3, with a deviation of 1/3.
    assert_statistics_close(nn.Sequential(model[1]), [(torch.cat(seen).mean(0), var)], 1e-5)


def test_dropout_keeps_its_mode_and_runs_as_in_training() -> None:
    ours = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3), nn.Dropout(0.5)).eval()
    ours[2].train()
    theirs = deepcopy(ours)
    data = [torch.randn(8, 3) for _ in range(3)]
    for update, model in ((fastswa.update_bn, ours), (swa_utils.update_bn, theirs)):
        torch.manual_seed(0)
        update(data, model)
    assert_buffers_equal(ours, theirs)
    assert [part.training for part in ours] == [False, False, True]


def test_layers_without_values_and_scripted_models() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.LazyBatchNorm2d())
    with pytest.raises(ValueError, match=r"1\.running_mean holds no values"):
        fastswa.update_bn(batches(), model)
    scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)))
    with pytest.raises(TypeError, match=r"torch\.jit\.script: the model"):
        fastswa.update_bn([torch.randn(4, 4)], scripted)
    with pytest.raises(TypeError, match=r"torch\.jit\.script: '0\.1'"):
        fastswa.update_bn([torch.randn(4, 4)], nn.Sequential(scripted))


def test_sweeps_refuse_what_gives_its_batches_once() -> None:
    model = trained(Net())
    before = state(model)
    with pytest.raises(ValueError, match="gives its batches once"):
        fastswa.update_bn(iter(batches()), model, sweeps=1)

    class Once:
        """An iterable that hides an iterator."""

        def __init__(self) -> None:
            self._batches = iter(batches())

        def __iter__(self) -> Iterator[Tensor]:
            return self._batches

    with pytest.raises(ValueError, match=r"gave no batches \(sweep 1 of 1\)"):
        fastswa.update_bn(Once(), model, sweeps=1)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "mean"}, "estimator must be one of"),
        ({"engine": "fast"}, "engine must be one of"),
        ({"engine": "eager", "estimator": "population"}, "can't serve estimator='population'"),
        ({"engine": "eager", "rtol": 0.1}, "can't serve rtol"),
        ({"sweeps": -1}, "sweeps must be at least 0"),
        ({"max_batches": 0}, "max_batches must be at least 1"),
        ({"rtol": 0.0}, "rtol must be positive"),
        ({"rtol": float("nan")}, "rtol must be positive"),
        ({"min_batches": 1}, "min_batches must be at least 2"),
        ({"on_singleton": "drop"}, "on_singleton must be"),
    ],
)
def test_arguments_out_of_range(options: dict[str, object], message: str) -> None:
    model = trained(Net())
    before = state(model)
    with pytest.raises(ValueError, match=message):
        fastswa.update_bn(breaking(OSError("read")), model, **options)
    assert_unchanged(model, before)
    with pytest.raises(TypeError, match="process_group must be a ProcessGroup, got str"):
        fastswa.update_bn(batches(), model, process_group="world")


def test_check_finite_can_be_left_out() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3))
    for engine in ENGINES:
        fastswa.update_bn([torch.full((4, 3), float("nan"))], model, check_finite=False, engine=engine)
        assert model[0].running_mean.isnan().all()
        model[0].reset_running_stats()


def test_max_batches_reads_no_further_and_the_bar_knows_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    model = trained(Net())
    expected = deepcopy(model)
    data = batches(6)
    torch.manual_seed(0)
    fastswa.update_bn(data[:3], expected)
    torch.manual_seed(0)
    report = fastswa.update_bn(breaking_after(data, 3), model, max_batches=3, progress=True)
    assert report.batches == 3
    assert_buffers_equal(model, expected)
    assert "3/3" in capsys.readouterr().err


def breaking_after(data: list[Tensor], count: int) -> Iterator[Tensor]:
    yield from data[:count]
    raise AssertionError("read too far")


class _Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return iter([torch.randn(1, 5, 5) for _ in range(24)])


def test_a_stream_has_a_bar_without_an_end(capsys: pytest.CaptureFixture[str]) -> None:
    fastswa.update_bn(DataLoader(_Stream(), batch_size=8), trained(Net()), progress=True)
    assert "3batch" in capsys.readouterr().err


def test_data_parallel_makes_no_copies() -> None:
    model = trained(Residual())
    expected = deepcopy(model)
    data = batches()
    fastswa.update_bn(data, expected)
    wrapper = DataParallel(model)
    # As on a machine with two GPUs, of which this one has none: spreading the model would fail.
    wrapper.device_ids, wrapper.src_device_obj = [0, 1], torch.device("cpu")
    report = fastswa.update_bn(data, wrapper)
    assert report.layers[0] == "norms.0"
    assert wrapper.device_ids == [0, 1]
    assert_buffers_equal(model, expected)
