"""Checkpoints that are either whole or not there."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

NAME = "checkpoint.pt"
"""Of the file in a run's folder."""

KEYS = ("options", "epoch", "model", "optimizer", "cycle", "averages", "rows", "random")
"""What a checkpoint holds."""


def replace_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that whoever reads it, also after a crash, finds the old content or the new one.

    Args:
        path: of the file; the temporary one is made in its folder.
        write: writes the content into an open file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # One name, so that a killed run leaves no more than one such file behind.
    temporary = path.with_name(f"{path.name}.part")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint.

    Args:
        path: of the file.
        state: with `KEYS`; tensors, numbers and strings in dicts and lists.
    """
    replace_file(path, lambda file: torch.save(dict(state), file))


def find(path: Path) -> Path:
    """The checkpoint that a path means.

    Args:
        path: of the file, or of a run's folder.

    Raises:
        FileNotFoundError: there is none.
    """
    file = path / NAME if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"there is no checkpoint {file}; --resume takes a run's folder or its {NAME}")
    return file


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a checkpoint; tensors, numbers and strings only, whatever the file says.

    Args:
        path: of the file.
        device: for the tensors.

    Raises:
        ValueError: it is damaged, or no checkpoint of a run.
    """
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    # A damaged file can fail in the archive, in the pickle or in a tensor's size, each with an error of its own.
    except Exception as error:
        raise ValueError(f"{path} can't be read: {error}") from error
    missing = [key for key in KEYS if not isinstance(state, dict) or key not in state]
    if missing:
        raise ValueError(f"{path} is no checkpoint of a run: there is no {missing[0]!r} in it")
    return dict(state)
