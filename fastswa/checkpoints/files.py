"""Checkpoint files, read in place: what they hold by name, and the same parts of several of them."""

from __future__ import annotations

import json
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastswa.checkpoints.state_dicts import select

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
PIECE = 1 << 15
"""Elements read at once. torch starts threads for more, whose meetings cost more than the work where cores are shared:
with two threads a run took from 0.9 to 30 times as long as with one."""
WINDOW = 128 << 20
"""Bytes of mapped files read until they are opened anew: what was read is in the process's memory until then."""


class Checkpoint(ABC):
    """A mapping of names to entries in a file or several, whose tensors are read when they are used.

    Args:
        path: as the user gave it, for messages.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._opened: Mapping[str, Any] | None = None

    @property
    def entries(self) -> Mapping[str, Any]:
        """What the checkpoint holds; tensors are views of the mapped file."""
        if self._opened is None:
            self._opened = self._open()
        return self._opened

    def release(self) -> None:
        """Let go of the mapped file; `entries` opens it again."""
        self._opened = None

    @abstractmethod
    def _open(self) -> Mapping[str, Any]: ...


class TorchFile(Checkpoint):
    """A file by torch.save.

    Args:
        path: of the file.
        key: of the state dict in it, with dots between the levels; None where the file is one.
    """

    def __init__(self, path: Path, key: str | None) -> None:
        super().__init__(path)
        self.key = key
        # Files older than torch 1.6 are no archives and can't be mapped: they are read whole, once.
        self.mapped = zipfile.is_zipfile(path)

    def release(self) -> None:
        """Let go of the mapped file; `entries` opens it again."""
        if self.mapped:
            super().release()

    def _open(self) -> Mapping[str, Any]:
        try:
            loaded = torch.load(self.path, map_location="cpu", weights_only=True, mmap=self.mapped)
        except OSError:
            raise
        except Exception as error:
            raise ValueError(self._unreadable()) from error
        return select(loaded, self.key, self.path)

    def _unreadable(self) -> str:
        objects: list[str] = []
        with suppress(Exception):
            objects = torch.serialization.get_unsafe_globals_in_checkpoint(self.path)
        if objects:
            return (
                f"{self.path} holds objects that are neither tensors nor plain containers: {', '.join(objects)}; "
                "save its state dict in a file of its own, or, if you trust the file, allow them with "
                "torch.serialization.add_safe_globals"
            )
        return (
            f"{self.path} can't be read by torch.load(weights_only=True): it is cut short, damaged, a TorchScript "
            "archive or no file by torch.save; copy it again, or save its state dict"
        )


class SafetensorsFile(Checkpoint):
    """A .safetensors file.

    Args:
        path: of the file.
    """

    def _open(self) -> Mapping[str, Any]:
        try:
            from safetensors import SafetensorError, safe_open
        except ImportError as error:
            raise ImportError(f"{self.path} needs safetensors: pip install fastswa[safetensors]") from error
        try:
            with safe_open(self.path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(
                f"{self.path} is cut short or no safetensors file ({error}); copy or save it again"
            ) from error


class Shards(Checkpoint):
    """The files of one model, by their index: {"weight_map": {name: file}}.

    Args:
        path: of the index.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            self.files: dict[str, str] = dict(json.loads(path.read_text())["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f'{path} is no index: it has no {{"weight_map": {{name: file}}}}') from error
        self.shards = {file: open_checkpoint(path.parent / file, None) for file in dict.fromkeys(self.files.values())}

    def release(self) -> None:
        """Let go of the mapped files; `entries` opens them again."""
        super().release()
        for shard in self.shards.values():
            shard.release()

    def _open(self) -> Mapping[str, Any]:
        entries = {}
        for name, file in self.files.items():
            held = self.shards[file].entries
            if name not in held:
                raise ValueError(f"{self.path} says that {file} holds {name!r}, but it does not")
            entries[name] = held[name]
        return entries


def open_checkpoint(path: Path, key: str | None) -> Checkpoint:
    """A checkpoint by its path; nothing is read but an index.

    Args:
        path: of a .pt, .pth, .bin, .ckpt or .safetensors file, of an index of several (*.index.json), or of a folder
            with one index or one such file.
        key: of the state dict in a file by torch.save.

    Returns:
        The checkpoint.

    Raises:
        FileNotFoundError: no such file, or a folder without one.
        ValueError: a folder with several, another suffix, a key for a file that has none.
    """
    path = _in_folder(path) if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; check the path")
    if path.suffix in TORCH_SUFFIXES:
        return TorchFile(path, key)
    index = path.name.endswith(".index.json")
    if not index and path.suffix != ".safetensors":
        suffixes = ", ".join((*TORCH_SUFFIXES, ".safetensors"))
        raise ValueError(f"{path} is not read by its name; a checkpoint ends with {suffixes} or .index.json")
    if key is not None:
        raise ValueError(f"key {key!r} is for files by torch.save; {path} holds nothing nested, so leave it out")
    return Shards(path) if index else SafetensorsFile(path)


class SideBySide:
    """Several checkpoints of the same names and shapes, read in parts.

    Args:
        checkpoints: all that may be read.
    """

    def __init__(self, checkpoints: Sequence[Checkpoint]) -> None:
        self.checkpoints = checkpoints
        self._read = 0

    def parts(self, name: str, chosen: Sequence[Checkpoint]) -> Iterator[list[Tensor]]:
        """The tensors of one name, cut into the same parts.

        Args:
            name: of a tensor.
            chosen: checkpoints to read it from.

        Yields:
            A part of each chosen checkpoint's tensor: about PIECE elements in the order of their indices, complex ones
            as pairs of real numbers. It is to be let go before the next is asked for.
        """
        start, stop = 0, 1
        while start < stop:
            tensors = [_real(checkpoint.entries[name]) for checkpoint in chosen]
            if all(tensor.is_contiguous() for tensor in tensors):
                tensors = [tensor.view(-1) for tensor in tensors]
            stop, count = len(tensors[0]), tensors[0].numel()
            length = max(1, PIECE * stop // max(1, count))
            while start < stop and self._read < WINDOW:
                yield [tensor[start : start + length].reshape(-1) for tensor in tensors]
                start += length
                self._read += sum(tensor.nbytes for tensor in tensors) * length // stop
            if self._read >= WINDOW:
                del tensors
                self.release()

    def release(self) -> None:
        """Let go of all mapped files."""
        self._read = 0
        for checkpoint in self.checkpoints:
            checkpoint.release()


def _in_folder(folder: Path) -> Path:
    for pattern in ("*.safetensors.index.json", "*.index.json", "*.safetensors", *(f"*{s}" for s in TORCH_SUFFIXES)):
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise ValueError(f"{folder} holds several checkpoints: {names}; give the path of one")
        if found:
            return found[0]
    raise FileNotFoundError(f"{folder} holds no checkpoint; give the path of a file")


def _real(tensor: Tensor) -> Tensor:
    # Conjugation and negation may be pending; both are kept in files.
    tensor = tensor.resolve_conj().resolve_neg()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
