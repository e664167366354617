"""What becomes of each entry of the checkpoints, or why it can't."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastswa.checkpoints.files import Checkpoint
from fastswa.checkpoints.output import Item

AVERAGED = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def plan(checkpoints: Sequence[Checkpoint], dtype: torch.dtype | None, keep_ties: bool) -> list[Item]:
    """The entries of the mean, in the last checkpoint's order.

    Args:
        checkpoints: one or more.
        dtype: of the means, one of AVERAGED; as in the last checkpoint if None.
        keep_ties: whether tensors that are one in all checkpoints are one in the mean.

    Returns:
        An item for each entry.

    Raises:
        ValueError: names, shapes or kinds that differ, entries that have no mean, or nothing to average; the file and
            the entry are named.
    """
    last = checkpoints[-1]
    for checkpoint in checkpoints[:-1]:
        _check_names(checkpoint, last)
    items = []
    first_of: dict[tuple[Any, ...], str] = {}
    for name, entry in last.entries.items():
        entries = [checkpoint.entries[name] for checkpoint in checkpoints]
        for checkpoint, other in zip(checkpoints, entries, strict=True):
            if reason := _no_mean(other) or _unlike(other, entry, last):
                raise ValueError(f"{name!r} in {checkpoint.path} {reason}")
        if not isinstance(entry, Tensor):
            items.append(Item(name, value=entry))
            continue
        tied_to = first_of.setdefault(_places(entries), name) if keep_ties and entry.numel() else name
        items.append(
            Item(
                name,
                shape=tuple(entry.shape),
                dtype=_converted(entry.dtype, dtype),
                averaged=entry.dtype.is_floating_point or entry.dtype.is_complex,
                tied_to=None if tied_to == name else tied_to,
            )
        )
    if not any(item.averaged for item in items):
        raise ValueError(f"{last.path} holds no floating-point tensors, so there is nothing to average")
    return items


def _check_names(checkpoint: Checkpoint, last: Checkpoint) -> None:
    names, expected = checkpoint.entries.keys(), last.entries.keys()
    missing = [name for name in expected if name not in names]
    extra = [name for name in names if name not in expected]
    if missing or extra:
        # The first of each is enough to see what went wrong, such as a prefix.
        parts = [f"{len(missing)} entries that {last.path} has, such as {missing[0]!r}"] if missing else []
        parts += [f"{len(extra)} only for itself, such as {extra[0]!r}"] if extra else []
        lacks = f"{checkpoint.path} lacks " if missing else f"{checkpoint.path} has "
        raise ValueError(lacks + (" and has " if missing else "").join(parts) + "; average checkpoints of one model")


def _no_mean(entry: Any) -> str | None:
    if not isinstance(entry, Tensor):
        return None
    if (
        type(entry) not in (Tensor, nn.Parameter)
        or entry.layout != torch.strided
        or entry.is_quantized
        or entry.is_meta
    ):
        kind = "quantised" if entry.is_quantized else f"{type(entry).__name__} {entry.layout} on {entry.device}"
        return f"is no plain tensor ({kind}); save plain tensors"
    parts = entry.dtype.to_real() if entry.dtype.is_complex else entry.dtype
    if parts.is_floating_point and parts not in AVERAGED:
        return f"is of {entry.dtype}: the mean of codes without their scales is not that of the weights; convert it"
    return None


def _unlike(entry: Any, expected: Any, last: Checkpoint) -> str | None:
    kinds = _kind(entry), _kind(expected)
    if kinds[0] != kinds[1]:
        return f"is {kinds[0]}, but {kinds[1]} in {last.path}; average checkpoints of one model"
    if isinstance(entry, Tensor) and entry.shape != expected.shape:
        shapes = tuple(entry.shape), tuple(expected.shape)
        return f"has shape {shapes[0]}, but {shapes[1]} in {last.path}; average checkpoints of one model"
    return None


def _kind(entry: Any) -> str:
    if not isinstance(entry, Tensor):
        return "no tensor"
    if entry.dtype.is_complex:
        return "complex"
    return "floating-point" if entry.dtype.is_floating_point else "of integers or bools"


def _places(entries: Sequence[Tensor]) -> tuple[Any, ...]:
    """Equal for two entries that are the same memory in every checkpoint."""
    return tuple((entry.data_ptr(), entry.dtype, entry.shape, entry.stride()) for entry in entries)


def _converted(found: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
    if dtype is None or not (found.is_floating_point or found.is_complex):
        return found
    if found.is_complex:
        # torch has none of 16 bits that is more than experimental.
        return torch.complex128 if dtype == torch.float64 else torch.complex64
    return dtype
