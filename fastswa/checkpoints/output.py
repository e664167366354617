"""Checkpoint files, written whole or not at all, from tensors that come in pieces."""

from __future__ import annotations

import json
import os
import secrets
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

SAFETENSORS_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Item:
    """An entry to be written.

    Args:
        name: of the entry.
        shape: of the tensor.
        dtype: of the tensor; None for an entry that is no tensor.
        averaged: whether it is a mean; if not, it is the last checkpoint's.
        tied_to: the name of an earlier entry that is the same tensor in every checkpoint.
        value: of an entry that is no tensor.
    """

    name: str
    shape: tuple[int, ...] = ()
    dtype: torch.dtype | None = None
    averaged: bool = False
    tied_to: str | None = None
    value: Any = None

    @property
    def nbytes(self) -> int:
        """The tensor's size in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize if self.dtype else 0


Pieces = Callable[[Item], Iterable[Tensor]]
"""A tensor's elements in the order of their indices, complex ones as pairs of real numbers."""


def write_torch(file: BinaryIO, items: Sequence[Item], pieces: Pieces, metadata: Mapping[str, Any] | None) -> None:
    """Write a file for torch.load(weights_only=True). Tied entries stay tied; all tensors are in memory at once.

    Args:
        file: opened for writing.
        items: in the state dict's order.
        pieces: of an item that is a tensor and not tied to another.
        metadata: the modules' versions, which load_state_dict reads; None without any.
    """
    state: OrderedDict[str, Any] = OrderedDict()
    for item in items:
        if item.dtype is None:
            state[item.name] = item.value
        elif item.tied_to is not None:
            state[item.name] = state[item.tied_to]
        else:
            tensor = torch.empty(item.shape, dtype=item.dtype)
            flat = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).view(-1)
            start = 0
            for piece in pieces(item):
                flat[start : start + len(piece)] = piece
                start += len(piece)
            state[item.name] = tensor
    if metadata is not None:
        state._metadata = metadata  # type: ignore[attr-defined]
    try:
        torch.save(state, file)
    except RuntimeError as error:
        # torch's own complaint follows the cause, such as a full disk.
        raise OSError(str(error.__context__ or error)) from error


def write_safetensors(
    file: BinaryIO, items: Sequence[Item], pieces: Pieces, metadata: Mapping[str, Any] | None
) -> None:
    """Write a .safetensors file, a piece at a time. Tied entries are written once for each name.

    The library's own writer takes tensors that are all in memory, so the format is written here: the header's length in
    8 bytes, the header in JSON, the tensors end to end.

    Args:
        file: opened for writing.
        items: that `safetensors_refusal` has nothing against.
        pieces: of an item.
        metadata: not written.
    """
    # Largest elements first, so that every tensor is aligned.
    ordered = sorted(items, key=lambda item: (-_itemsize(item), item.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for item in ordered:
        assert item.dtype is not None
        stop = start + item.nbytes
        dtype = SAFETENSORS_NAMES[item.dtype]
        header[item.name] = {"dtype": dtype, "shape": list(item.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for item in ordered:
        for piece in pieces(item):
            file.write(piece.contiguous().view(torch.uint8).numpy().data)


def safetensors_refusal(item: Item) -> str | None:
    """Why a .safetensors file can't hold an entry.

    Args:
        item: to be written.

    Returns:
        The reason in words, None if it can.

    Example:
        >>> safetensors_refusal(Item("step", value=3))
        'is an int'
    """
    if item.dtype is None:
        kind = type(item.value).__name__
        return f"is {'an' if kind[0] in 'aeiou' else 'a'} {kind}"
    if item.dtype not in SAFETENSORS_NAMES:
        return f"is of {item.dtype}"
    return "has the name of the file's metadata" if item.name == "__metadata__" else None


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes a path's place when all of it is written; until then the path is as it was.

    Args:
        path: of the file to be.

    Yields:
        A file beside it, opened for writing, which is removed on any failure.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"{path} could not be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _itemsize(item: Item) -> int:
    return item.dtype.itemsize if item.dtype else 0
