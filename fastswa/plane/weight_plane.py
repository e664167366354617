"""WeightPlane: the plane through three points of weight space, and what a model does on it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from fastswa import backends
from fastswa.batch_norm import update_bn
from fastswa.plane.evaluation import check_progress, fill, lent, named
from fastswa.plane.geometry import measure, norm, project
from fastswa.plane.grid import Array, PlaneGrid
from fastswa.plane.weights import ROLES, Entry, Weights, find, match, read


class Coordinates(NamedTuple):
    """Where weights are, seen from a plane.

    Args:
        x: along w2 - w1, in the unit of the weights.
        y: along the part of w3 - w1 that is orthogonal to it.
        distance: from the plane, 0 or more.
    """

    x: float
    y: float
    distance: float


class WeightPlane:
    r"""The plane through three points of weight space, with an orthonormal basis, as in the paper's figures.

    .. math::
        P(x, y) = w_1 + x \frac{u}{|u|} + y \frac{v}{|v|}, \qquad
        u = w_2 - w_1, \quad v = (w_3 - w_1) - \frac{\langle w_3 - w_1, u \rangle}{|u|^2}\, u

    It is measured over parameters only, tied ones once, in float64. Of a module these are its parameters; of a mapping,
    which does not say, all floating tensors but those named running_mean and running_var. `write_` combines the other
    floating tensors by the same coefficients, so that the model at one of the three points is that model.

    The plane keeps copies of all tensors, because training goes on in place: three times the model's memory, and the
    model's own once more during `evaluate`.

    Args:
        w1: a module, an AveragedModel, or a mapping name -> tensor such as a state dict; the origin.
        w2: on the x axis; of w1's names and shapes, where the prefixes of DistributedDataParallel and torch.compile
            don't count. Tensors of different dtypes are kept in one that holds them all.
        w3: above the x axis; likewise.
        device: of the copies, such as "cpu" to spare a GPU's memory; w1's own if left out.

    Raises:
        ValueError: names or shapes that differ, values that are not finite, points that coincide or lie on one line;
            says which.
        TypeError: what is no weights; says which.

    Example:
        >>> w1, w2, w3 = ({"w": torch.tensor(point)} for point in ([0.0, 0.0, 1.0], [4.0, 0.0, 1.0], [1.0, 2.0, 1.0]))
        >>> plane = WeightPlane(w1, w2, w3)
        >>> plane.coordinates({"w": torch.tensor([3.0, 1.0, 1.5])})
        Coordinates(x=3.0, y=1.0, distance=0.5)
        >>> weights = {"w": torch.empty(3)}
        >>> plane.write_(weights, 3.0, 1.0)
        >>> weights["w"]
        tensor([3., 1., 1.])

    References:
        Izmailov et al. 2018, Averaging Weights Leads to Wider Optima and Better Generalization, section 3.3;
        Garipov et al. 2018, Loss Surfaces, Mode Connectivity, and Fast Ensembling of DNNs, appendix A.1.
    """

    @torch.no_grad()
    def __init__(
        self, w1: Weights, w2: Weights, w3: Weights, *, device: int | torch.device | str | None = None
    ) -> None:
        points = [read(weights, role) for weights, role in zip((w1, w2, w3), ROLES, strict=True)]
        entries = match(points)
        modules = [point for point in points if point.parameters is not None] or points
        measured = {name for point in modules for name in point.floating if point.measures(name)}
        first = [each for each in entries if not measured.isdisjoint(each.names)]
        if not first:
            raise ValueError("the points have no floating parameters to span a plane")
        self._triangle = measure([each.names[0] for each in first], [each.points for each in first])
        place = None if device is None else torch.device(device)
        self._measured = [_kept(each, place) for each in first]
        self._others = [_kept(each, place) for each in entries if measured.isdisjoint(each.names)]
        self._integers = [{name: own.clone() for name, own in point.integers.items()} for point in points]
        self._known = frozenset(name for each in entries for name in each.names)

    @property
    def points(self) -> tuple[Coordinates, Coordinates, Coordinates]:
        """The coordinates of w1, w2 and w3."""
        side, foot, height = self._triangle.side, self._triangle.foot, self._triangle.height
        return Coordinates(0.0, 0.0, 0.0), Coordinates(side, 0.0, 0.0), Coordinates(foot, height, 0.0)

    @property
    def fingerprint(self) -> dict[str, float]:
        """Numbers that tell this plane from others, by what they measure; files of grids hold them."""
        first = [each.points[0] for each in self._measured]
        return {
            "number of parameters": float(sum(tensor.numel() for tensor in first)),
            "norm of w1": norm(first),
            "x of w2": self._triangle.side,
            "x of w3": self._triangle.foot,
            "y of w3": self._triangle.height,
        }

    def coefficients(self, x: float, y: float) -> tuple[float, float, float]:
        r"""The affine combination that a point of the plane is.

        .. math:: P(x, y) = c_1 w_1 + c_2 w_2 + c_3 w_3, \qquad c_1 + c_2 + c_3 = 1

        Args:
            x: along the first direction.
            y: along the second.

        Returns:
            c1, c2 and c3; at `points` exactly 1, 0 and 0 in this or another order.

        Example:
            >>> w1, w2, w3 = ({"w": torch.tensor(point)} for point in ([0.0, 0.0], [4.0, 0.0], [1.0, 2.0]))
            >>> WeightPlane(w1, w2, w3).coefficients(2.5, 1.0)
            (0.0, 0.5, 0.5)
        """
        return self._triangle.coefficients(x, y)

    @torch.no_grad()
    def coordinates(self, weights: Weights) -> Coordinates:
        """Where further weights are: the foot of the perpendicular on the plane, and its length.

        Args:
            weights: a module, an AveragedModel or a mapping, of the plane's names and shapes.

        Returns:
            The coordinates, in float64.

        Raises:
            ValueError: names or shapes that differ; says which.
            TypeError: what is no weights; says which.
        """
        found = find(self._measured, read(weights, "the weights"), self._known)
        for each, own in zip(self._measured, found, strict=True):
            if any(not torch.equal(own[0], other) for other in own[1:]):
                raise ValueError(f"{each.names} are tied in the points but differ in the weights")
        points = [(*each.points, own[0]) for each, own in zip(self._measured, found, strict=True)]
        return Coordinates(*project(self._triangle, points))

    @torch.no_grad()
    def write_(self, model: Weights, x: float, y: float) -> None:
        """Write the weights at a point of the plane into a model, by one fused combination.

        Arithmetic is float64, rounded once. At `points` the model becomes that point's, bit for bit: integer tensors
        are those of the point with the largest coefficient.

        Args:
            model: a module, an AveragedModel or a mapping, of the plane's names and shapes. Buffers that the plane
                does not have are left as they are.
            x: along the first direction, finite.
            y: along the second, finite.

        Raises:
            ValueError: a coordinate that is not finite; names or shapes that differ, weights tied otherwise; says
                which. Nothing has been written.
            TypeError: what is no weights; says which.
        """
        if not (math.isfinite(x) and math.isfinite(y)):
            raise ValueError(f"x and y must be finite, got {x} and {y}")
        entries = [*self._measured, *self._others]
        named_model = read(model, "the model")
        found = find(entries, named_model, self._known)
        targets = [(tensor, each.points) for each, own in zip(entries, found, strict=True) for tensor in own]
        sources = [[points[number] for _, points in targets] for number in range(len(ROLES))]
        coefficients = self.coefficients(x, y)
        backends.combine_([tensor for tensor, _ in targets], sources, coefficients)
        nearest = self._integers[coefficients.index(max(coefficients))]
        for name, tensor in named_model.integers.items():
            if name in nearest:
                tensor.copy_(nearest[name])
        # Autocast would go on with its converted copies of other weights until its context ends.
        torch.clear_autocast_cache()

    def grid(
        self, points: int = 21, margin: float = 0.2, include: Iterable[Weights | Coordinates] = ()
    ) -> tuple[Array, Array]:
        """Coordinates of a grid around the three points.

        Args:
            points: in a row and in a column, at least 2.
            margin: around the points on all sides, as a share of the longer side of the box that holds them; 0 or more.
            include: further weights, or their coordinates, that are to be in that box.

        Returns:
            x of the columns and y of the rows.

        Raises:
            ValueError: an argument out of its range.

        Example:
            >>> w1, w2, w3 = ({"w": torch.tensor(point)} for point in ([0.0, 0.0], [4.0, 0.0], [1.0, 2.0]))
            >>> x, y = WeightPlane(w1, w2, w3).grid(points=3, margin=0.25)
            >>> x.tolist(), y.tolist()
            ([-1.0, 2.0, 5.0], [-1.0, 1.0, 3.0])
        """
        if points < 2:
            raise ValueError(f"points must be at least 2, got {points}")
        if not 0 <= margin < math.inf:
            raise ValueError(f"margin must be at least 0 and finite, got {margin}")
        further = [each if isinstance(each, Coordinates) else self.coordinates(each) for each in include]
        places = np.array([each[:2] for each in (*self.points, *further)])
        low, high = places.min(0), places.max(0)
        room = margin * (high - low).max()
        x, y = np.linspace(low - room, high + room, points).T
        return x, y

    def evaluate(
        self,
        model: nn.Module,
        function: Callable[[nn.Module], float | Tensor | Mapping[str, float | Tensor]],
        x: ArrayLike,
        y: ArrayLike,
        *,
        update_bn_loader: Iterable[Any] | None = None,
        update_bn_options: Mapping[str, Any] | None = None,
        path: str | os.PathLike[str] | None = None,
        save_every: float = 30.0,
        progress: bool = False,
    ) -> PlaneGrid:
        """Call a function of the model at each point of a grid.

        Args:
            model: a module of the plane's names and shapes. Each point's weights are written into it; afterwards, also
                after an exception, its tensors and its modules' modes are as they were.
            function: of the model; returns a number, or a mapping name -> number with the same names each time.
            x: coordinates of the grid's columns, ascending; see `grid`.
            y: coordinates of its rows, ascending.
            update_bn_loader: batches from which BatchNorm statistics are recomputed at each point, by
                `fastswa.update_bn`. A loader that gives the same batches each time makes points comparable.
            update_bn_options: further arguments of `update_bn`, such as the device.
            path: of an .npz file that keeps what was found, also when the run is interrupted. Where it is there
                already, the points in it are not computed again.
            save_every: seconds between writing it.
            progress: show a bar (needs tqdm).

        Returns:
            The values; a single number's name is "value".

        Raises:
            ValueError: names or shapes that differ; coordinates out of order; a file of another plane or grid; a
                loader that gives its batches once; says which.
            TypeError: a function that returns something else.
            ImportError: progress without tqdm.

        Example:
            >>> corners = [torch.nn.Linear(2, 1) for _ in range(3)]
            >>> plane, model = WeightPlane(*corners), torch.nn.Linear(2, 1)
            >>> grid = plane.evaluate(model, lambda model: model.weight.norm(), *plane.grid(points=5))
            >>> grid.values["value"].shape
            (5, 5)
        """
        check_progress(progress)
        if isinstance(update_bn_loader, Iterator):
            raise ValueError("update_bn_loader is read at every point, but it is an iterator, which gives batches once")
        grid = PlaneGrid(np.asarray(x, np.float64), np.asarray(y, np.float64), self.fingerprint)
        if path is not None and Path(path).exists():
            stored = PlaneGrid.load(path)
            different = grid.difference(stored)
            if different:
                raise ValueError(f"{os.fspath(path)} is of another grid: {different}; remove it, or give another path")
            grid = stored
        options = dict(update_bn_options or {})

        def values(x: float, y: float) -> dict[str, float]:
            self.write_(model, x, y)
            if update_bn_loader is not None:
                update_bn(update_bn_loader, model, **options)
            return named(function(model))

        with lent(model):
            fill(grid, values, path, save_every, progress)
        return grid


def _kept(entry: Entry, device: torch.device | None) -> Entry:
    """Copies of a tensor's points, in one dtype and on one device."""
    first, second, third = entry.points
    dtype = torch.promote_types(torch.promote_types(first.dtype, second.dtype), third.dtype)
    place = first.device if device is None else device
    return Entry(entry.names, tuple(point.to(place, dtype, copy=True) for point in entry.points))
