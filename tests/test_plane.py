"""WeightPlane against numpy's float64, and what it takes and refuses."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import fastswa
from fastswa.plane import Coordinates, WeightPlane
from tests.models import ComplexNet, ConvNet, TiedNet, train_step
from tests.numerics import assert_close_in_ulps
from tests.plane import one_thread, points_of  # noqa: F401 - a fixture

EXACT = 1e-12
"""Of float64 sums over 90,000 elements: 2^-53 times the square root of their number, with a margin of thirty."""


def vector(model: nn.Module | Mapping[str, Tensor]) -> NDArray[np.float64]:
    """All parameters in float64, tied ones once."""
    tensors = model.parameters() if isinstance(model, nn.Module) else model.values()
    return np.concatenate([tensor.detach().double().numpy().ravel() for tensor in tensors])


def assert_same_bits(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        # torch.equal takes -0 for 0.
        assert tensor.contiguous().numpy().tobytes() == theirs[name].contiguous().numpy().tobytes(), name


def test_the_basis_is_orthonormal() -> None:
    points = points_of(ConvNet().double())
    plane = WeightPlane(*points)
    weights = np.stack([vector(point) for point in points])
    origin, first, second = (np.array(plane.coefficients(*at)) @ weights for at in ((0, 0), (1, 0), (0, 1)))
    basis = np.stack([first - origin, second - origin])
    assert np.abs(basis @ basis.T - np.eye(2)).max() < EXACT
    assert np.abs(origin - weights[0]).max() == 0
    # u is along w2 - w1, and w3 is on the side of v.
    assert np.abs(basis[0] * np.linalg.norm(weights[1] - weights[0]) - (weights[1] - weights[0])).max() < EXACT
    assert basis[1] @ (weights[2] - weights[0]) > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_coordinates(dtype: torch.dtype) -> None:
    points = points_of(ConvNet().to(dtype), 4)
    plane = WeightPlane(*points[:3])
    w1, w2, w3, w = (vector(point) for point in points)
    orthogonal, _ = np.linalg.qr(np.stack([w2 - w1, w3 - w1], axis=1))
    # QR chooses signs of its own.
    orthogonal *= np.sign(orthogonal.T @ np.stack([w2 - w1, w3 - w1], axis=1)).diagonal()
    expected = [orthogonal.T @ (each - w1) for each in (w1, w2, w3, w)]
    for found, place in zip((*plane.points, plane.coordinates(points[3])), expected, strict=True):
        assert found[:2] == pytest.approx(place, rel=EXACT, abs=EXACT * np.linalg.norm(w1))
    distance = np.linalg.norm(w - w1 - orthogonal @ expected[3])
    assert plane.coordinates(points[3]).distance == pytest.approx(distance, rel=EXACT)
    for own, point in zip(plane.points, points[:3], strict=True):
        assert plane.coordinates(point) == pytest.approx(own, abs=EXACT * np.linalg.norm(w1))


def test_coordinates_of_affine_combinations_and_of_weights_above_them() -> None:
    points = points_of(ConvNet().double())
    plane = WeightPlane(*points)
    weights = np.stack([vector(point) for point in points])
    u, w = weights[1] - weights[0], weights[2] - weights[0]
    generator = np.random.default_rng(0)
    up = generator.normal(size=u.size)
    up -= np.stack([u, w]).T @ np.linalg.lstsq(np.stack([u, w]).T, up, rcond=None)[0]
    up /= np.linalg.norm(up)
    model = copy.deepcopy(points[0])
    for height in (0.0, 1e-4, 3.0):
        c2, c3 = generator.normal(size=2)
        combination = weights[0] + c2 * u + c3 * w + height * up
        torch.nn.utils.vector_to_parameters(torch.from_numpy(combination), model.parameters())
        place = np.array([(0, 1 - c2 - c3), (1, c2), (2, c3)])
        expected = sum(share * np.array(plane.points[int(number)][:2]) for number, share in place)
        found = plane.coordinates(model)
        size = np.linalg.norm(combination)
        assert found[:2] == pytest.approx(expected, abs=EXACT * size)
        assert found.distance == pytest.approx(height, abs=EXACT * size)


def test_coefficients_at_the_points_are_exact() -> None:
    generator = np.random.default_rng(0)
    for _ in range(300):
        points = generator.normal(size=(3, 5)) * 10.0 ** generator.integers(-3, 4)
        plane = WeightPlane(*({"w": torch.from_numpy(point)} for point in points))
        found = [plane.coefficients(x, y) for x, y, _ in plane.points]
        assert found == [(1, 0, 0), (0, 1, 0), (0, 0, 1)]
        assert not any(math.copysign(1, value) < 0 for row in found for value in row)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_at_its_points_the_plane_is_the_models_bit_for_bit(dtype: torch.dtype) -> None:
    points = points_of(ConvNet().to(dtype))
    with torch.no_grad():
        points[1].hidden.weight[0, 0] = -0.0
    plane, model = WeightPlane(*points), ConvNet().to(dtype)
    images = torch.randn(16, 1, 8, 8, dtype=dtype)
    for own, point in zip(plane.points, points, strict=True):
        plane.write_(model, own.x, own.y)
        assert_same_bits(model.state_dict(), point.state_dict())
        assert torch.equal(model.eval()(images), point.eval()(images))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_between_them_it_is_the_combination_rounded_once(dtype: torch.dtype) -> None:
    points = points_of(ConvNet().to(dtype))
    plane, model = WeightPlane(*points), copy.deepcopy(points[0])
    x, y = 0.3 * plane.points[1].x, 0.8 * plane.points[2].y
    plane.write_(model, x, y)
    coefficients = plane.coefficients(x, y)
    for name, tensor in model.state_dict().items():
        own = [point.state_dict()[name] for point in points]
        if tensor.is_floating_point():
            exact = sum(c * each.double() for c, each in zip(coefficients, own, strict=True))
            # Half an ulp, and a little for half precision, which is reached through float32.
            assert_close_in_ulps(tensor, exact, 0.51)
        else:
            assert torch.equal(tensor, own[coefficients.index(max(coefficients))]), name


def test_modules_averaged_models_and_mappings_are_the_same_points() -> None:
    points = points_of(ConvNet())
    averages = []
    for point in points:
        averages.append(fastswa.AveragedModel(point))
        averages[-1].update_parameters(point)
    # What torch.compile wraps is called so; it takes seconds to import.
    compiled = [nn.Module() for _ in points]
    for outer, point in zip(compiled, points, strict=True):
        outer._orig_mod = point
    wrapped = [nn.DataParallel(points[0]), compiled[1], nn.DataParallel(compiled[2])]
    # The module's buffer "scratch" is not saved, so a state dict has all that a module has here.
    plane = WeightPlane(*points)
    kinds = [points, averages, [each.state_dict() for each in averages], wrapped]
    kinds += [[dict(each.named_parameters()) for each in points], [each.state_dict() for each in wrapped]]
    for kind in kinds:
        other = WeightPlane(*kind)
        assert other.points == plane.points
        assert [plane.coordinates(each) for each in kind] == [plane.coordinates(each) for each in points]
        for target in (ConvNet(), fastswa.AveragedModel(ConvNet())):
            other.write_(target, *plane.points[2][:2])
            assert vector(target).tolist() == vector(points[2]).tolist()
    inside = [fastswa.AveragedModel(nn.DataParallel(point)) for point in points]
    assert WeightPlane(*inside).points == plane.points
    target = fastswa.AveragedModel(ConvNet())
    WeightPlane(*averages).write_(target, 0.0, 0.0)
    assert target.n_averaged == 0
    mixed = WeightPlane(points[0], averages[1].state_dict(), points[2])
    assert mixed.points == plane.points


def test_of_a_mapping_all_but_batch_norm_statistics_are_measured() -> None:
    points = points_of(ConvNet())
    with torch.no_grad():
        for number, point in enumerate(points):
            point.norm.running_mean += 1000.0 * number**2
    assert WeightPlane(*(point.state_dict() for point in points)).points == WeightPlane(*points).points
    scaled = [
        {**dict(point.named_parameters()), "scale": torch.tensor(scale)}
        for point, scale in zip(points, (0.0, 7.0, 0.0), strict=True)
    ]
    more = WeightPlane(*scaled)
    assert more.points[1].x == pytest.approx(math.hypot(WeightPlane(*points).points[1].x, 7.0), rel=EXACT)


def test_tied_weights_count_once() -> None:
    points = points_of(TiedNet())
    plane = WeightPlane(*points)
    assert plane.points[1].x == pytest.approx(np.linalg.norm(vector(points[1]) - vector(points[0])), rel=EXACT)
    states = [point.state_dict() for point in points]
    short = [{name: tensor for name, tensor in state.items() if name != "head.weight"} for state in states]
    for kind in (states, short, [points[0], short[1], states[2]]):
        other = WeightPlane(*kind)
        assert other.points == plane.points
        model = TiedNet()
        other.write_(model, *plane.points[1][:2])
        assert model.head.weight is model.embedding.weight
        assert_same_bits(model.state_dict(), states[1])
    # A copy that lost the tie gets both.
    untied = TiedNet()
    untied.head.weight = nn.Parameter(torch.zeros(11, 6))
    plane.write_(untied, *plane.points[1][:2])
    assert_same_bits(untied.state_dict(), states[1])
    assert plane.coordinates(untied) == plane.coordinates(points[1])


def test_complex_weights_are_measured_by_their_parts() -> None:
    points = points_of(ComplexNet())
    plane, model = WeightPlane(*points), ComplexNet()
    parts = [
        np.concatenate(
            [torch.view_as_real(p).detach().ravel() if p.is_complex() else p.detach() for p in m.parameters()]
        )
        for m in points
    ]
    length = np.linalg.norm(parts[1].astype(np.float64) - parts[0])
    assert plane.points[1].x == pytest.approx(length, rel=EXACT)
    plane.write_(model, *plane.points[2][:2])
    assert_same_bits(model.state_dict(), points[2].state_dict())


def test_points_of_different_dtypes_are_kept_exactly() -> None:
    points = points_of(nn.Linear(5, 4).bfloat16())
    wide = copy.deepcopy(points[1]).float()
    train_step(wide)
    plane, model = WeightPlane(points[0], wide, points[2].half()), nn.Linear(5, 4)
    for own, point in zip(plane.points, (points[0], wide, points[2]), strict=True):
        plane.write_(model, own.x, own.y)
        assert torch.equal(model.weight, point.weight.float())


def test_the_plane_keeps_copies() -> None:
    points = points_of(ConvNet())
    before = copy.deepcopy(points[2].state_dict())
    plane, model = WeightPlane(*points), ConvNet()
    for point in points:
        train_step(point)
    plane.write_(model, *plane.points[2][:2])
    assert_same_bits(model.state_dict(), before)


def test_the_grid_holds_the_points_and_a_margin() -> None:
    plane = WeightPlane(*points_of(ConvNet()))
    x, y = plane.grid(points=7, margin=0.1, include=[Coordinates(-5.0, 1.0, 0.0)])
    places = np.array([*plane.points, (-5.0, 1.0, 0.0)])[:, :2]
    room = 0.1 * np.ptp(places, axis=0).max()
    assert (len(x), len(y)) == (7, 7)
    assert (x[0], y[0]) == pytest.approx(places.min(0) - room)
    assert (x[-1], y[-1]) == pytest.approx(places.max(0) + room)
    average = fastswa.AveragedModel(points_of(ConvNet())[0])
    assert plane.grid(include=[average])[0][0] < plane.coordinates(average).x < plane.grid(include=[average])[0][-1]
    for wrong in ({"points": 1}, {"margin": -0.1}, {"margin": math.nan}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            plane.grid(**wrong)
