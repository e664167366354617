"""What WeightPlane refuses, and how it says so."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from fastswa.plane import WeightPlane
from tests.models import ConvNet, TiedNet
from tests.plane import one_thread, points_of  # noqa: F401 - a fixture


def test_points_that_span_no_plane_are_refused() -> None:
    first, second, third = points_of(ConvNet())
    for corners, names in (((first, first, third), "w1 and w2"), ((first, second, first), "w1 and w3")):
        with pytest.raises(ValueError, match=f"{names} coincide"):
            WeightPlane(*corners)
    with pytest.raises(ValueError, match="w2 and w3 coincide"):
        WeightPlane(first, second, second)
    close = copy.deepcopy(first)
    with torch.no_grad():
        for own, other in zip(close.parameters(), second.parameters(), strict=True):
            own += 1e-3 * (other - own)
    for corner, share in ((second, 0.5), (second, -0.4), (close, 1 / 3), (close, 1.7)):
        # Rounding takes these off the line; between close points, by more than a millionth of their distance.
        between = copy.deepcopy(first)
        with torch.no_grad():
            for own, other in zip(between.parameters(), corner.parameters(), strict=True):
                own.copy_(own.double() + share * (other.double() - own.double()))
        with pytest.raises(ValueError, match="lie on one line: the triangle is"):
            WeightPlane(first, corner, between)
        with torch.no_grad():
            between.hidden.weight += 1e-4 * torch.randn_like(between.hidden.weight)
        height = 1e-4 * between.hidden.weight.numel() ** 0.5
        assert WeightPlane(first, corner, between).points[2].y == pytest.approx(height, rel=0.1)


def test_weights_that_never_moved_hide_no_plane() -> None:
    points = torch.randn(3, 5)
    frozen = torch.full((1000,), 1e9)
    plane = WeightPlane(*({"frozen": frozen, "head": point} for point in points))
    # Rounded as they are, the frozen weights alone could be 1e3 from where they belong.
    assert plane.points == WeightPlane(*({"head": point} for point in points)).points


def test_weights_that_are_tied_otherwise_are_refused() -> None:
    untied = TiedNet()
    untied.head.weight = nn.Parameter(torch.zeros(11, 6))
    points = points_of(TiedNet())
    with pytest.raises(ValueError, match=r"embedding.weight.*head.weight.*differ in the weights"):
        WeightPlane(*points).coordinates(untied)
    before = copy.deepcopy(points[0].state_dict())
    with pytest.raises(ValueError, match=r"'embedding.weight' and 'head.weight' are tied in the model"):
        WeightPlane(*points_of(untied)).write_(points[0], 0.0, 0.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in points[0].state_dict().items())


def test_what_does_not_fit_is_named() -> None:
    points = points_of(ConvNet())
    plane = WeightPlane(*points)
    states = [dict(point.state_dict()) for point in points]
    less = {name: tensor for name, tensor in states[0].items() if name != "head.weight"}
    other = {**states[0], "head.weight": torch.zeros(2, 300)}
    spoilt = {**states[0], "head.weight": torch.full((3, 300), math.nan)}
    nested = {"epoch": 3, **states[0]}
    for wrong, kind, words in (
        (less, ValueError, "no floating tensor 'head.weight'"),
        ({**states[0], "more": torch.ones(2)}, ValueError, "'more'"),
        (other, ValueError, r"'head.weight' has shape \(2, 300\)"),
        (nested, TypeError, "'epoch' of .* is int, not a tensor"),
        ([1.0], TypeError, "got list"),
        ({**states[0], "head.bias": torch.ones(3).to_sparse()}, TypeError, "'head.bias'.*sparse"),
        ({**states[0], "module.head.bias": torch.ones(3)}, ValueError, "two tensors named 'head.bias'"),
        (ConvNet(9), ValueError, "has shape"),
        (nn.LazyLinear(3), ValueError, "not initialised"),
    ):
        with pytest.raises(kind, match=words):
            WeightPlane(points[0], wrong, points[2])
        with pytest.raises(kind, match=words):
            plane.coordinates(wrong)
        with pytest.raises(kind, match=words):
            plane.write_(wrong, 0.0, 0.0)
    with pytest.raises(ValueError, match=r"'head.weight' of w2 is not finite"):
        WeightPlane(points[0], spoilt, points[2])
    with pytest.raises(ValueError, match="no floating parameters"):
        WeightPlane(*({"n": torch.tensor(number)} for number in range(3)))
    before = copy.deepcopy(points[0].state_dict())
    with pytest.raises(ValueError, match="must be finite"):
        plane.write_(points[0], math.nan, 0.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in points[0].state_dict().items())
