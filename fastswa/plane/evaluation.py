"""Find the values of a grid point by point, in a model that is lent for it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import numpy as np
from torch import Tensor, nn

from fastswa.plane.grid import PlaneGrid
from fastswa.swap import restored

SINGLE = "value"
"""The name of a value where there is one."""


@contextmanager
def lent(model: nn.Module) -> Iterator[None]:
    """Give a model its tensors' values and its modules' modes back at the end, come what may.

    Args:
        model: to be written and run meanwhile; copies of its tensors are kept.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        with restored([*model.parameters(), *model.buffers()]):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def fill(
    grid: PlaneGrid,
    find: Callable[[float, float], Mapping[str, float]],
    path: str | os.PathLike[str] | None,
    save_every: float,
    progress: bool,
) -> None:
    """Find the values of all points of a grid that are not done.

    Args:
        grid: to be filled.
        find: the values at x, y, by name.
        path: of a file that is kept up to date; also when `find` raises.
        save_every: seconds between writing it.
        progress: show a bar.
    """
    missing: Iterable[Any] = np.argwhere(~grid.done)
    if progress:
        missing = _bar(missing, grid)
    written, new = time.monotonic(), False
    try:
        for row, column in missing:
            grid.put(row, column, find(float(grid.x[column]), float(grid.y[row])))
            new = True
            if path is not None and time.monotonic() - written >= save_every:
                grid.save(path)
                written, new = time.monotonic(), False
    finally:
        if path is not None and new:
            grid.save(path)


def named(found: object) -> dict[str, float]:
    """What a user's function returned, by name.

    Args:
        found: a number, or a mapping name -> number; tensors of one element are numbers.

    Returns:
        Floats by name; of a single number by the name "value".

    Raises:
        TypeError: something else.

    Example:
        >>> named(0.5), named({"loss": torch.tensor(2.0)})
        ({'value': 0.5}, {'loss': 2.0})
    """
    values: Mapping[Any, Any] = found if isinstance(found, Mapping) else {SINGLE: found}
    try:
        return {
            str(name): float(value.detach() if isinstance(value, Tensor) else value) for name, value in values.items()
        }
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"the function must return a number or a mapping name -> number, got {found!r}") from error


def check_progress(progress: bool) -> None:
    """Refuse a bar that can't be shown.

    Args:
        progress: whether one is asked for.

    Raises:
        ImportError: says what to install.
    """
    if progress and find_spec("tqdm") is None:
        raise ImportError("progress=True needs tqdm: pip install fastswa[progress]")


def _bar(missing: Any, grid: PlaneGrid) -> Iterable[Any]:
    from tqdm.auto import tqdm

    done = int(grid.done.sum())
    bar: Iterable[Any] = tqdm(missing, desc="plane", total=grid.done.size, initial=done, unit="point")
    return bar
