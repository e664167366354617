"""Values on a plane's grid: found in a model that gets its own back, kept in a file, and gone on with from there."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import swa_utils

from fastswa.plane import PlaneGrid, WeightPlane
from tests.models import ConvNet, train_step
from tests.plane import one_thread, points_of  # noqa: F401 - a fixture

X, Y = np.linspace(-1.0, 2.0, 4), np.linspace(0.0, 1.0, 3)


@pytest.fixture
def model() -> ConvNet:
    return ConvNet()


@pytest.fixture
def plane(model: ConvNet) -> WeightPlane:
    return WeightPlane(*points_of(model))


class Counting:
    """A function of a model that counts its calls, and fails at one of them."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.calls, self.fails_at = 0, fails_at

    def __call__(self, model: nn.Module) -> float:
        self.calls += 1
        if self.calls == self.fails_at:
            raise KeyboardInterrupt
        return float(model.head.weight[0, 0].detach())


def test_batch_norm_is_recomputed_at_each_point(plane: WeightPlane, model: ConvNet) -> None:
    batches = [(torch.randn(8, 1, 8, 8), torch.randint(3, (8,))) for _ in range(3)]

    def loss(model: nn.Module) -> Tensor:
        model.eval()
        return sum(cross_entropy(model(images), labels) for images, labels in batches)

    grid = plane.evaluate(model, lambda model: {"loss": loss(model), "twice": 2 * loss(model)}, X, Y)
    recomputed = plane.evaluate(model, loss, X, Y, update_bn_loader=batches)
    assert (grid.x.tolist(), grid.y.tolist()) == (X.tolist(), Y.tolist())
    assert grid.values.keys() == {"loss", "twice"}
    assert recomputed.values.keys() == {"value"}
    assert grid.done.all()
    other = ConvNet()
    for (row, y), (column, x) in product(enumerate(Y), enumerate(X)):
        plane.write_(other, x, y)
        assert grid.values["loss"][row, column] == float(loss(other).detach())
        assert grid.values["twice"][row, column] == 2 * grid.values["loss"][row, column]
        swa_utils.update_bn(batches, other)
        # fastswa's update_bn gives torch's statistics bit for bit on a CPU.
        assert recomputed.values["value"][row, column] == float(loss(other).detach())
    assert not np.allclose(grid.values["loss"], recomputed.values["value"])
    fewer = plane.evaluate(model, loss, X, Y, update_bn_loader=batches, update_bn_options={"max_batches": 1})
    assert not np.allclose(fewer.values["value"], recomputed.values["value"])


def test_autocast_sees_the_weights_of_each_point(plane: WeightPlane, model: ConvNet) -> None:
    images = torch.randn(4, 1, 8, 8)

    def score(model: nn.Module) -> Tensor:
        return model.eval()(images).float().square().mean().detach()

    with torch.autocast("cpu", torch.bfloat16):
        grid = plane.evaluate(model, score, X, Y)
        after = score(model)
    other = ConvNet()
    for (row, y), (column, x) in product(enumerate(Y), enumerate(X)):
        plane.write_(other, x, y)
        with torch.autocast("cpu", torch.bfloat16):
            assert grid.values["value"][row, column] == float(score(other))
    with torch.autocast("cpu", torch.bfloat16):
        assert after == score(model)


def test_at_the_points_it_is_the_models_own_value(plane: WeightPlane, model: ConvNet) -> None:
    # The third point is the model as it stands.
    own = float(model.head.weight[1, 2].detach())
    x, y = sorted({each.x for each in plane.points}), sorted({each.y for each in plane.points})
    grid = plane.evaluate(model, lambda model: model.head.weight[1, 2], x, y)
    assert grid.values["value"][y.index(plane.points[2].y), x.index(plane.points[2].x)] == own
    assert grid.points == tuple(point[:2] for point in plane.points)


def test_at_the_points_the_loss_is_that_of_the_three_models(model: ConvNet) -> None:
    models = points_of(model)
    plane = WeightPlane(*models)
    batches = [(torch.randn(8, 1, 8, 8), torch.randint(3, (8,))) for _ in range(3)]

    def loss(model: nn.Module) -> Tensor:
        model.eval()
        return sum(cross_entropy(model(images), labels) for images, labels in batches)

    x, y = sorted({each.x for each in plane.points}), sorted({each.y for each in plane.points})
    for loader in (None, batches):
        grid = plane.evaluate(model, loss, x, y, update_bn_loader=loader)
        for point, own in zip(plane.points, models, strict=True):
            own = copy.deepcopy(own)
            if loader is not None:
                swa_utils.update_bn(loader, own)
            # The same weights bit for bit, in the same operations.
            assert grid.values["value"][y.index(point.y), x.index(point.x)] == float(loss(own).detach())


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_gets_its_own_back(plane: WeightPlane, model: ConvNet, fails: bool) -> None:
    train_step(model)
    model.train()
    model.norm.eval()
    before = {name: tensor.clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    modes = [module.training for module in model.modules()]

    def evaluate(model: nn.Module) -> float:
        model.eval()
        model.head_norm.train()
        model.scratch += 1
        if fails:
            raise RuntimeError("diverged")
        return 0.0

    batches = [torch.randn(4, 1, 8, 8)]
    if fails:
        with pytest.raises(RuntimeError, match="diverged"):
            plane.evaluate(model, evaluate, X, Y, update_bn_loader=batches)
    else:
        plane.evaluate(model, evaluate, X, Y, update_bn_loader=batches)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert torch.equal(tensor, before[name]), name
    assert [module.training for module in model.modules()] == modes


def test_an_interrupted_run_goes_on(plane: WeightPlane, model: ConvNet, tmp_path: Path) -> None:
    path = tmp_path / "new" / "plane.npz"
    first, second = Counting(fails_at=6), Counting()
    with pytest.raises(KeyboardInterrupt):
        plane.evaluate(model, first, X, Y, path=path)
    stored = PlaneGrid.load(path)
    assert stored.done.ravel().tolist() == [True] * 5 + [False] * 7
    assert np.isnan(stored.values["value"]).ravel().tolist() == [False] * 5 + [True] * 7
    grid = plane.evaluate(model, second, X, Y, path=path)
    assert second.calls == 12 - 5
    whole = plane.evaluate(model, Counting(), X, Y)
    assert np.array_equal(grid.values["value"], whole.values["value"])
    third = Counting()
    again = plane.evaluate(model, third, X, Y, path=path)
    assert third.calls == 0
    assert np.array_equal(again.values["value"], whole.values["value"])
    assert os.listdir(path.parent) == ["plane.npz"]


def test_the_file_is_written_now_and_then(plane: WeightPlane, model: ConvNet, tmp_path: Path) -> None:
    path = tmp_path / "plane.npz"
    done: dict[float, list[int]] = {0.0: [], 1e6: []}
    for save_every, counts in done.items():
        path.unlink(missing_ok=True)

        def count(model: nn.Module, counts: list[int] = counts) -> float:
            counts.append(int(PlaneGrid.load(path).done.sum()) if path.exists() else 0)
            return 0.0

        plane.evaluate(model, count, X, Y, path=path, save_every=save_every)
        assert PlaneGrid.load(path).done.all()
    assert done == {0.0: list(range(12)), 1e6: [0] * 12}


def test_what_is_not_finite_is_a_value(plane: WeightPlane, model: ConvNet, tmp_path: Path) -> None:
    path = tmp_path / "plane.npz"
    plane.evaluate(model, lambda model: float("nan"), X, Y, path=path)
    again = Counting()
    assert np.isnan(plane.evaluate(model, again, X, Y, path=path).values["value"]).all()
    assert again.calls == 0


def test_files_of_other_grids_are_refused(plane: WeightPlane, model: ConvNet, tmp_path: Path) -> None:
    path = tmp_path / "plane.npz"
    plane.evaluate(model, Counting(), X, Y, path=path)
    before = path.read_bytes()
    points = [copy.deepcopy(model) for _ in range(3)]
    for point in points:
        train_step(point)
    with torch.no_grad():
        for number in range(3):
            plane.write_(points[number], *plane.points[number][:2])
        points[2].head.weight[0, 0] += 1e-3
    for other, x, y, words in (
        (plane, X[:3], Y, "its x has 4 coordinates"),
        (plane, X, Y + 1e-3, "its y has 3 coordinates"),
        (WeightPlane(*points), X, Y, "w3 is"),
        (WeightPlane(points[1], points[0], points[2]), X, Y, "plane's"),
    ):
        with pytest.raises(ValueError, match=rf"plane\.npz is of another grid: .*{words}"):
            other.evaluate(model, Counting(), x, y, path=path)
    half = tmp_path / "half.npz"
    with pytest.raises(KeyboardInterrupt):
        plane.evaluate(model, Counting(fails_at=6), X, Y, path=half)
    with pytest.raises(ValueError, match=r"the values are \['loss'\], but those of the points before are \['value'\]"):
        plane.evaluate(model, lambda model: {"loss": 0.0}, X, Y, path=half)
    assert path.read_bytes() == before


def test_files_that_are_none_are_refused(plane: WeightPlane, model: ConvNet, tmp_path: Path) -> None:
    whole = tmp_path / "whole.npz"
    plane.evaluate(model, Counting(), X, Y, path=whole)
    writers: list[Callable[[Path], object]] = [
        lambda path: path.write_bytes(whole.read_bytes()[:200]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("x"),
        lambda path: np.savez(path, x=X),
        lambda path: np.save(path.open("wb"), X),
    ]
    for write in writers:
        path = tmp_path / "plane.npz"
        write(path)
        function = Counting()
        with pytest.raises(ValueError, match=r"plane\.npz holds no grid"):
            plane.evaluate(model, function, X, Y, path=path)
        assert function.calls == 0


def test_a_file_is_replaced_when_the_new_one_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plane.npz"
    grid = PlaneGrid(X, Y, {"x of w2": 1.0})
    grid.put(0, 0, {"train loss": 1.5, "ä/b": -2.0})
    grid.save(path)
    before = path.read_bytes()
    loaded = PlaneGrid.load(path)
    assert loaded.plane == grid.plane
    assert list(loaded.values) == ["train loss", "ä/b"]
    assert np.array_equal(loaded.values["ä/b"], grid.values["ä/b"], equal_nan=True)

    def fails(descriptor: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", fails)
    grid.put(0, 1, {"train loss": 1.5, "ä/b": -2.0})
    with pytest.raises(OSError, match="no space"):
        grid.save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["plane.npz"]


def test_refusals(plane: WeightPlane, model: ConvNet, monkeypatch: pytest.MonkeyPatch) -> None:
    function = Counting()
    for x in ([], [0.0, 0.0], [1.0, 0.0], [0.0, float("nan")], [[0.0]]):
        with pytest.raises(ValueError, match="x must be finite coordinates in ascending order"):
            plane.evaluate(model, function, x, Y)
    with pytest.raises(ValueError, match="update_bn_loader is read at every point"):
        plane.evaluate(model, function, X, Y, update_bn_loader=iter([]))
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ImportError, match=r"pip install fastswa\[progress\]"):
        plane.evaluate(model, function, X, Y, progress=True)
    assert function.calls == 0
    for wrong in ("high", None, {"loss": torch.ones(2)}):
        with pytest.raises(TypeError, match="must return a number or a mapping"):
            plane.evaluate(model, lambda model, wrong=wrong: wrong, X, Y)


def test_the_bar_counts_points(plane: WeightPlane, model: ConvNet, capfd: pytest.CaptureFixture[str]) -> None:
    plane.evaluate(model, Counting(), X, Y, progress=True)
    assert "12/12" in capfd.readouterr().err
