"""PlaneGrid: what was found on a plane of weight space, in memory and in a file."""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

ALIKE = 1e-9
"""How far two measurements of one plane may differ, relatively: other devices and threads sum in another order."""


@dataclass(eq=False)
class PlaneGrid:
    """Values on a grid of a plane.

    Args:
        x: coordinates of the columns, ascending.
        y: coordinates of the rows, ascending.
        plane: numbers that tell the plane from others, by what they measure (`WeightPlane.fingerprint`).
        values: by name, in `values[name][row, column]`; NaN where nothing is known yet.
        done: which points are known, `done[row, column]`.

    Raises:
        ValueError: coordinates that are not finite or not ascending.
    """

    x: Array
    y: Array
    plane: dict[str, float]
    values: dict[str, Array] = field(default_factory=dict)
    done: NDArray[np.bool_] = field(default_factory=lambda: np.zeros((0, 0), bool))

    def __post_init__(self) -> None:
        self.x, self.y = _ascending("x", self.x), _ascending("y", self.y)
        if not self.done.size:
            self.done = np.zeros((len(self.y), len(self.x)), bool)

    @property
    def points(self) -> tuple[tuple[float, float], tuple[float, float], tuple[float, float]]:
        """Coordinates of the three points that the plane goes through."""
        return (0.0, 0.0), (self.plane["x of w2"], 0.0), (self.plane["x of w3"], self.plane["y of w3"])

    def put(self, row: int, column: int, found: Mapping[str, float]) -> None:
        """Take up what was found at a point.

        Args:
            row: number of its y.
            column: number of its x.
            found: values by name; the same names at every point.

        Raises:
            ValueError: other names than at the points before.
        """
        if not self.done.any():
            self.values = {name: np.full(self.done.shape, np.nan) for name in found}
        if found.keys() != self.values.keys():
            raise ValueError(
                f"the values are {sorted(found)}, but those of the points before are {sorted(self.values)}"
            )
        for name, value in found.items():
            self.values[name][row, column] = value
        self.done[row, column] = True

    def difference(self, other: PlaneGrid) -> str | None:
        """Why another grid's values are not values of this one.

        Args:
            other: such as one from a file.

        Returns:
            The first difference in words, or None.
        """
        scale = ALIKE * self.plane["x of w2"]
        for name, here in self.plane.items():
            there = other.plane.get(name, math.nan)
            # Negated, so that NaN is a difference.
            if not math.isclose(here, there, rel_tol=ALIKE, abs_tol=scale):
                return f"its plane's {name} is {there:.9g} in place of {here:.9g}"
        for name, own, theirs in (("x", self.x, other.x), ("y", self.y, other.y)):
            if len(own) != len(theirs) or not np.allclose(own, theirs, rtol=ALIKE, atol=scale):
                return (
                    f"its {name} has {len(theirs)} coordinates from {theirs[0]:.6g} to {theirs[-1]:.6g} in place of "
                    f"{len(own)} from {own[0]:.6g} to {own[-1]:.6g}"
                )
        return None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a file that `load` takes; it replaces another one only when it is whole.

        Args:
            path: of the file, by custom ending in ".npz"; missing folders are made.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        names = list(self.values)
        try:
            with temporary.open("wb") as file:
                np.savez(
                    file,
                    x=self.x,
                    y=self.y,
                    done=self.done,
                    plane_names=np.array(list(self.plane), dtype=str),
                    plane=np.array(list(self.plane.values())),
                    names=np.array(names, dtype=str),
                    values=np.array([self.values[name] for name in names]).reshape(-1, *self.done.shape),
                )
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PlaneGrid:
        """Read a file of `save`.

        Args:
            path: of the file.

        Returns:
            The grid, with points still to be found where the file's run was interrupted.

        Raises:
            ValueError: the file is no such file; names it.
            OSError: the file can't be read.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                plane = dict(zip(file["plane_names"].tolist(), file["plane"].tolist(), strict=True))
                values = dict(zip(file["names"].tolist(), file["values"], strict=True))
                return cls(file["x"], file["y"], plane, values, file["done"])
        except (KeyError, TypeError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{Path(path)} holds no grid of a plane; remove it, or give another path") from error


def _ascending(name: str, coordinates: ArrayLike) -> Array:
    array = np.asarray(coordinates, dtype=np.float64)
    if array.ndim != 1 or not array.size or not np.isfinite(array).all() or not (np.diff(array) > 0).all():
        raise ValueError(f"{name} must be finite coordinates in ascending order, got {array}")
    return array
