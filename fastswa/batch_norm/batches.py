"""Batches of a loader: what of one goes to the model, how it gets to a device, and how many samples it has."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Forward = Callable[[nn.Module, Any], object]
"""How a model is called with a batch."""


def select(batch: Any) -> Any:
    """What of a batch goes to the model, by torch's rule.

    Args:
        batch: of a loader.

    Returns:
        The first of a list or tuple; anything else as it is.

    Example:
        >>> select(("images", "labels"))
        'images'
    """
    return batch[0] if isinstance(batch, (list, tuple)) and batch else batch


def call(model: nn.Module, batch: Any) -> object:
    """Call a model with what was selected of a batch.

    Args:
        model: to call.
        batch: a mapping becomes keyword arguments, anything else the one argument.

    Returns:
        What the model returns.
    """
    return model(**batch) if isinstance(batch, Mapping) else model(batch)


def samples(batch: Any) -> int | None:
    """How many samples a batch has.

    Args:
        batch: a tensor, or any nesting of lists, tuples and mappings.

    Returns:
        The first dimension of the first tensor that has dimensions, or None where there is no such tensor.

    Example:
        >>> samples({"mask": None, "tokens": torch.zeros(8, 128)})
        8
    """
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.dim() else None
    parts: Iterable[Any] = ()
    if isinstance(batch, Mapping):
        parts = batch.values()
    elif isinstance(batch, Sequence) and not isinstance(batch, (str, bytes)):
        parts = batch
    return next((count for part in parts if (count := samples(part)) is not None), None)


def move(batch: Any, to: Callable[[Any], Any]) -> Any:
    """Apply a function to everything in a batch that can be moved to a device.

    Args:
        batch: a tensor, an object with a method `to`, or any nesting of lists, tuples (named ones too) and mappings;
            anything else stays as it is.
        to: returns the moved tensor or object.

    Returns:
        A batch of the same structure.

    Example:
        >>> move({"x": [torch.zeros(2)], "name": "digits"}, lambda tensor: tensor.double())
        {'x': [tensor([0., 0.], dtype=torch.float64)], 'name': 'digits'}
    """
    if hasattr(batch, "to"):
        return to(batch)
    if isinstance(batch, Mapping):
        return {key: move(value, to) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(move(value, to) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(move(value, to) for value in batch)
    return batch


@dataclass(frozen=True)
class Batches:
    """The batches of a pass, each ready to be run.

    Args:
        loader: of batches.
        device: where they are moved; None leaves them where they are.
        forward: how the model is called; None for torch's rule, and mappings as keyword arguments.
        most: batches of a pass; None for all.
        skip_single: leave out batches of one sample.
        ahead: copy a batch while the one before is in use, where the device is CUDA.
        progress: show a bar.
    """

    loader: Iterable[Any]
    device: torch.device | None
    forward: Forward | None
    most: int | None
    skip_single: bool
    ahead: bool
    progress: bool

    def through(self, model: nn.Module, title: str) -> Iterator[tuple[Callable[[], object], int | None]]:
        """The batches of one pass.

        Args:
            model: that they go through.
            title: of the bar.

        Yields:
            A call that runs the batch, and how many samples it has, None if it holds no tensor.
        """
        batches: Iterable[Any] = itertools.islice(self.loader, self.most)
        if self.progress:
            batches = _bar(batches, self.loader, self.most, title)
        if self.forward is None:
            batches = map(select, batches)
        run = self.forward or call
        for batch in on_device(batches, self.device, self.ahead):
            count = samples(batch)
            if not (self.skip_single and count == 1):
                yield partial(run, model, batch), count


def _bar(batches: Iterable[Any], loader: Iterable[Any], most: int | None, title: str) -> Iterable[Any]:
    from tqdm.auto import tqdm

    try:
        total: int | None = len(loader)  # type: ignore[arg-type]
    except TypeError:
        total = None
    if most is not None:
        total = min(total or most, most)
    bar: Iterable[Any] = tqdm(batches, desc=title, total=total, unit="batch")
    return bar


def on_device(batches: Iterable[Any], device: torch.device | None, ahead: bool) -> Iterator[Any]:
    """Batches moved to a device.

    Args:
        batches: of any structure that `move` knows.
        device: where to; None leaves them where they are.
        ahead: on a CUDA device, copy the next batch on a stream of its own while one is in use. It is then read from
            `batches` one earlier.

    Yields:
        Each batch, ready for the current stream.
    """
    if device is None:
        yield from batches
    elif not ahead or device.type != "cuda":
        yield from (move(batch, lambda part: part.to(device)) for batch in batches)
    else:
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        waiting: tuple[Any, torch.cuda.Event] | None = None
        for batch in batches:
            with torch.cuda.stream(stream):
                copied = move(batch, lambda part: _start_copy(part, device)), stream.record_event()
            if waiting is not None:
                yield _arrived(*waiting, device)
            waiting = copied
        if waiting is not None:
            yield _arrived(*waiting, device)


def _start_copy(part: Any, device: torch.device) -> Any:
    if not isinstance(part, Tensor):
        return part.to(device)
    if part.device.type == "cpu":
        # Only from pinned memory does the copy leave the host free. Pinned memory is kept until the copy is done.
        part = part.pin_memory()
    return part.to(device, non_blocking=True)


def _arrived(batch: Any, copied: torch.cuda.Event, device: torch.device) -> Any:
    current = torch.cuda.current_stream(device)
    current.wait_event(copied)

    def keep(part: Any) -> Any:
        if isinstance(part, Tensor):
            # Its memory was allocated on the other stream, and must not be reused there while this one reads it.
            part.record_stream(current)
        return part

    return move(batch, keep)
