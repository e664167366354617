"""A triangle of weights: its sides, and where other weights are, seen from it. All sums in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PIECE = 2**20
"""Elements of a tensor that are converted to float64 at a time."""

FLAT = 1e-6
"""The least height of a triangle, as a share of its longest side."""


@dataclass(frozen=True)
class Triangle:
    """A triangle w1, w2, w3 in coordinates of its plane: w1 at the origin, w2 on the x axis, w3 above it.

    Args:
        side: x of w2, positive.
        foot: x of w3.
        height: y of w3, positive.
    """

    side: float
    foot: float
    height: float

    def coefficients(self, x: float, y: float) -> tuple[float, float, float]:
        """The weights of the three points in the affine combination that gives a point of the plane.

        Args:
            x, y: coordinates.

        Returns:
            Three numbers whose sum is 1; exactly 1, 0 and 0 at the triangle's own points.

        Example:
            >>> Triangle(side=3.0, foot=0.1, height=0.7).coefficients(0.1, 0.7)
            (0.0, 0.0, 1.0)
        """
        c3 = y / self.height
        # In this form both terms are the same number at w3, whatever the division rounds.
        c2 = x / self.side - c3 * (self.foot / self.side)
        return 1.0 - c2 - c3, c2, c3


def measure(names: Sequence[str], points: Sequence[Sequence[Tensor]]) -> Triangle:
    """Measure the triangle of three points.

    Args:
        names: of the tensors.
        points: of each tensor, as it is in w1, w2 and w3: of one shape, any floating dtypes and devices.

    Returns:
        The triangle.

    Raises:
        ValueError: values that are not finite, with the tensor's name; points that coincide or lie on one line.
    """
    sums = torch.zeros(4, dtype=torch.float64)
    for w1, w2, w3 in pieces(points):
        u, w = w2 - w1, w3 - w1
        sums += torch.stack([u.square().sum(), w.square().sum(), (w3 - w2).square().sum(), (u * w).sum()]).cpu()
    uu, ww, third, uw = sums.tolist()
    if not math.isfinite(uu + ww):
        raise ValueError(_not_finite(names, points))
    for length, first, second in ((uu, "w1", "w2"), (ww, "w1", "w3"), (third, "w2", "w3")):
        if length == 0:
            raise ValueError(f"{first} and {second} coincide in all parameters; a plane needs three different points")
    ratio = uw / uu
    height, blur = _height(points, ratio)
    longest = math.sqrt(max(uu, ww, third))
    if height <= max(FLAT * longest, blur):
        raise ValueError(
            f"w1, w2 and w3 lie on one line: the triangle is {longest:.3g} long and {height:.3g} high, and what their "
            f"dtypes round may be {blur:.3g}; take a point off the line"
        )
    return Triangle(math.sqrt(uu), ratio * math.sqrt(uu), height)


def project(triangle: Triangle, points: Sequence[Sequence[Tensor]]) -> tuple[float, float, float]:
    """Drop a perpendicular on the plane of a triangle.

    Args:
        triangle: of the points w1, w2 and w3.
        points: of each tensor, as it is in w1, w2, w3 and in the weights in question.

    Returns:
        x, y and the distance from the plane.
    """
    ratio = triangle.foot / triangle.side
    sums = torch.zeros(2, dtype=torch.float64)
    for w1, w2, w3, w in pieces(points):
        u = w2 - w1
        sums += torch.stack([((w - w1) * u).sum(), ((w - w1) * (w3 - w1 - ratio * u)).sum()]).cpu()
    x, y = float(sums[0]) / triangle.side, float(sums[1]) / triangle.height
    _, c2, c3 = triangle.coefficients(x, y)
    # Not |w - w1|^2 - x^2 - y^2, which loses a small distance.
    off = sum(float((w - w1 - c2 * (w2 - w1) - c3 * (w3 - w1)).square().sum()) for w1, w2, w3, w in pieces(points))
    return x, y, math.sqrt(off)


def norm(tensors: Sequence[Tensor]) -> float:
    """The length of a vector that lies in several tensors.

    Args:
        tensors: of any floating dtypes.

    Returns:
        The square root of the sum of squares.
    """
    return math.sqrt(sum(float(piece.square().sum()) for (piece,) in pieces([[tensor] for tensor in tensors])))


def pieces(points: Sequence[Sequence[Tensor]]) -> Iterator[list[Tensor]]:
    """Tensors piece by piece, so that float64 never needs room for a whole one.

    Args:
        points: of each tensor, as it is in each point: of one shape.

    Yields:
        The same stretch of each point, in float64, on the first point's device.
    """
    for tensors in points:
        flat = [torch.split(tensor.reshape(-1), PIECE) for tensor in tensors]
        for parts in zip(*flat, strict=True):
            yield [part.to(tensors[0].device, torch.float64) for part in parts]


def _height(points: Sequence[Sequence[Tensor]], ratio: float) -> tuple[float, float]:
    """The height, and how much of it may come from the rounding of points that were on one line."""
    sums = torch.zeros(2, dtype=torch.float64)
    for tensors in points:
        halves = [torch.finfo(tensor.dtype).eps / 2 for tensor in tensors]
        shares = [half * share for half, share in zip(halves, (1 - ratio, ratio, 1.0), strict=True)]
        for w1, w2, w3 in pieces([tensors]):
            v = w3 - w1 - ratio * (w2 - w1)
            error = sum(((share * w).square() for share, w in zip(shares, (w1, w2, w3), strict=True)), 0 * w1)
            # Weights that never moved say nothing about the others.
            sums += torch.stack([v.square().sum(), (error * (v != 0)).sum()]).cpu()
    height, blur = sums.sqrt().tolist()
    return height, blur


def _not_finite(names: Sequence[str], points: Sequence[Sequence[Tensor]]) -> str:
    for name, tensors in zip(names, points, strict=True):
        for role, tensor in zip(("w1", "w2", "w3"), tensors, strict=True):
            if not tensor.isfinite().all():
                return f"{name!r} of {role} is not finite"
    return "the points are too far apart for float64"
