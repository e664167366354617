"""Which part of a loaded checkpoint is the state dict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

NAMED = 5
"""Candidates that a message names."""


def select(loaded: Any, key: str | None, path: Path) -> Mapping[str, Any]:
    """The state dict in what torch.load gave.

    Args:
        loaded: by torch.load.
        key: of the state dict, with dots between the levels; None if `loaded` is one.
        path: of the file, for messages.

    Returns:
        A mapping of names to entries, some of them tensors.

    Raises:
        ValueError: there is no state dict at that place; the message names the places where one is.

    Example:
        >>> checkpoint = {"epoch": 3, "model": {"state_dict": {"weight": torch.ones(2)}}}
        >>> select(checkpoint, "model.state_dict", Path("last.pt"))
        {'weight': tensor([1., 1.])}
        >>> select(checkpoint, None, Path("last.pt"))
        Traceback (most recent call last):
        ValueError: last.pt is a nested checkpoint; give the key (--key) of a state dict: 'model.state_dict' (1 tensors)
    """
    found = sorted(_candidates(loaded), key=lambda candidate: -candidate[1])
    if key is None:
        # A state dict may hold a mapping, such as a module's extra state, but not one of as many tensors as its own.
        if _tensors(loaded) > max((count for _, count in found), default=0):
            return _named(loaded, path)
        fault = "is a nested checkpoint; give the key (--key) of a state dict"
    else:
        entry = _at(loaded, key)
        if _tensors(entry):
            return _named(entry, path)
        fault = f"has no state dict at the key {key!r}; one is at"
    if not found:
        hint = f", nor anywhere else in this {type(loaded).__name__}" if key else ""
        raise ValueError(f"{path} holds no tensors by name{f' at {key!r}' if key else ''}{hint}; is it a checkpoint?")
    names = [f"{name!r} ({count} tensors)" for name, count in found[:NAMED]]
    raise ValueError(f"{path} {fault}: {', '.join(names)}")


def _at(loaded: Any, key: str) -> Any:
    if not isinstance(loaded, Mapping):
        return None
    if key in loaded:
        return loaded[key]
    # The longest first level that is there: names may hold dots themselves.
    for cut in reversed([index for index, letter in enumerate(key) if letter == "."]):
        if key[:cut] in loaded:
            return _at(loaded[key[:cut]], key[cut + 1 :])
    return None


def _candidates(loaded: Any, prefix: str = "") -> Iterator[tuple[str, int]]:
    """The nested mappings that hold tensors by name, and how many."""
    if isinstance(loaded, Mapping) and all(isinstance(name, str) for name in loaded):
        for name, entry in loaded.items():
            if count := _tensors(entry):
                yield prefix + name, count
            yield from _candidates(entry, f"{prefix}{name}.")


def _tensors(entry: Any) -> int:
    return sum(isinstance(value, Tensor) for value in entry.values()) if isinstance(entry, Mapping) else 0


def _named(entry: Mapping[Any, Any], path: Path) -> Mapping[str, Any]:
    for name in entry:
        if not isinstance(name, str):
            raise ValueError(f"{path} holds {name!r} among the names of its tensors; names are strings")
    return entry
