"""The mean of checkpoint files."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastswa.checkpoints.files import Checkpoint, SideBySide, open_checkpoint
from fastswa.checkpoints.float64_mean import float64_mean
from fastswa.checkpoints.output import Item, replacing, safetensors_refusal, write_safetensors, write_torch
from fastswa.checkpoints.plan import AVERAGED, plan

WRITERS = {".pt": write_torch, ".safetensors": write_safetensors}


@dataclass(frozen=True)
class CheckpointReport:
    """What `average_checkpoints` did.

    Args:
        output: the file written.
        weights: of the checkpoints, with the sum 1.
        averaged: names of the entries that are means.
        kept: names of the entries that are the last checkpoint's: integers, bools and what is no tensor.
        not_finite: names of the means with NaN or infinity in them.
        bytes: size of the file.
        seconds: that it took.
    """

    output: Path
    weights: tuple[float, ...]
    averaged: tuple[str, ...]
    kept: tuple[str, ...]
    not_finite: tuple[str, ...]
    bytes: int
    seconds: float


@torch.no_grad()
def average_checkpoints(
    paths: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    weights: Sequence[float] | None = None,
    key: str | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = False,
) -> CheckpointReport:
    r"""Write the weighted mean of checkpoint files.

    .. math:: \bar\theta = \mathrm{round}\Big( \sum_k w_k \theta_k \Big/ \sum_k w_k \Big)

    in float64, in the order of the paths, rounded once. Real and complex floating tensors are averaged; entries that
    are integers, bools or no tensors are the last checkpoint's. Files are read in pieces: beside them, a .safetensors
    output needs no memory, a .pt output its own size. The output appears whole or not at all, so it may be one of the
    inputs.

    Tensors that share memory in every checkpoint share it in a .pt file; a .safetensors file can't, and holds them once
    for each name. BatchNorm statistics are averaged like any tensor: they are not those of the averaged weights, which
    `update_bn` computes.

    Args:
        paths: one or more: .pt, .pth, .bin or .ckpt files by torch.save (read with weights_only=True), .safetensors
            files, indices of sharded ones (*.index.json), or folders that hold one of these. Kinds may be mixed.
        output: .pt or .safetensors, a state dict in either case.
        weights: one for each path, divided by their sum; equal if left out. One of weight 0 is not averaged.
        key: of the state dict in each file by torch.save, such as "state_dict" or "model.state_dict".
        dtype: float32, float16, bfloat16 or float64, of all means (complex ones become complex128 for float64 and
            complex64 otherwise); as in the last checkpoint if left out.
        progress: show a bar (needs tqdm).

    Returns:
        What was averaged and what was kept.

    Raises:
        FileNotFoundError: an input, or the output's folder, does not exist.
        ImportError: a .safetensors input or the bar needs a package that is not installed.
        TypeError: one path instead of a sequence of them.
        ValueError: a file that can't be read, or is a nested checkpoint (the message names the keys); names, shapes or
            kinds of entries that differ (with the first at fault and its file); entries that have no mean, such as
            float8 codes, whose scales stand elsewhere; entries that the output can't hold; weights of another number,
            not finite or with the sum 0; no paths. In all cases nothing has been written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for epoch in (1, 2):
        ...         torch.save({"weight": torch.full((2,), float(epoch)), "epoch": epoch}, f"{folder}/{epoch}.pt")
        ...     report = average_checkpoints([f"{folder}/1.pt", f"{folder}/2.pt"], f"{folder}/mean.pt")
        ...     dict(torch.load(f"{folder}/mean.pt"))
        {'weight': tensor([1.5000, 1.5000]), 'epoch': 2}
        >>> report.kept
        ('epoch',)

    References:
        Izmailov et al. 2018, Averaging Weights Leads to Wider Optima and Better Generalization, section 3.2.
        Wortsman et al. 2022, Model soups: averaging weights of multiple fine-tuned models improves accuracy without
        increasing inference time, section 2.
    """
    started = time.perf_counter()
    if isinstance(paths, (str, os.PathLike)):
        raise TypeError(f"paths must be a sequence of paths, got the one path {os.fspath(paths)!r}")
    target = Path(output)
    _check_arguments(len(paths), target, weights, dtype, progress)
    weights = [1.0] * len(paths) if weights is None else [float(weight) for weight in weights]
    checkpoints = [open_checkpoint(Path(path), key) for path in paths]
    items = plan(checkpoints, dtype, keep_ties=target.suffix == ".pt")
    if target.suffix == ".safetensors":
        for item in items:
            if reason := safetensors_refusal(item):
                raise ValueError(f"{item.name!r} {reason}, which no .safetensors file holds; write a .pt file")
    metadata = getattr(checkpoints[-1].entries, "_metadata", None)
    total = sum(item.nbytes for item in items if item.tied_to is None)
    with _bar(total if progress else None) as advance, replacing(target) as file:
        mean = _Mean(checkpoints, weights, advance)
        WRITERS[target.suffix](file, items, mean.pieces, metadata)
        mean.inputs.release()
    return CheckpointReport(
        output=target,
        weights=tuple(weight / math.fsum(weights) for weight in weights),
        averaged=tuple(item.name for item in items if item.averaged),
        kept=tuple(item.name for item in items if not item.averaged),
        not_finite=tuple(mean.not_finite),
        bytes=target.stat().st_size,
        seconds=time.perf_counter() - started,
    )


class _Mean:
    """The pieces of the mean's tensors, computed when they are asked for."""

    def __init__(
        self, checkpoints: Sequence[Checkpoint], weights: Sequence[float], advance: Callable[[int], Any]
    ) -> None:
        self.inputs = SideBySide(checkpoints)
        # 0 times infinity would spoil the sum.
        read = [(each, weight) for each, weight in zip(checkpoints, weights, strict=True) if weight]
        self.read, self.weights = [each for each, _ in read], [weight for _, weight in read]
        self.last = checkpoints[-1:]
        self.advance = advance
        self.not_finite: dict[str, None] = {}

    def pieces(self, item: Item) -> Iterator[Tensor]:
        """An item's elements, in order."""
        for parts in self.inputs.parts(item.name, self.read if item.averaged else self.last):
            piece = parts[0]
            if item.averaged and item.dtype:
                dtype = item.dtype.to_real() if item.dtype.is_complex else item.dtype
                piece = float64_mean(parts, self.weights, dtype)
                # A sum in float64 tells in one pass; only values near its own limit add up to infinity.
                if not piece.sum(dtype=torch.float64).isfinite() and not piece.isfinite().all():
                    self.not_finite[item.name] = None
            del parts
            yield piece
            self.advance(piece.nbytes)


def _check_arguments(
    count: int, target: Path, weights: Sequence[float] | None, dtype: torch.dtype | None, progress: bool
) -> None:
    if not count:
        raise ValueError("no paths; give at least one checkpoint")
    if target.suffix not in WRITERS:
        raise ValueError(f"output {target} must end with {' or '.join(WRITERS)}")
    if target.is_dir():
        raise ValueError(f"output {target} is a folder; give the path of a file")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"the folder {target.parent} of output {target.name} does not exist; make it first")
    if weights is not None:
        if len(weights) != count:
            raise ValueError(f"{len(weights)} weights for {count} checkpoints; give one for each, in their order")
        size = sum(map(abs, weights))
        # A sum such as 0.1 + 0.2 - 0.3 is 0 but for the rounding of its terms.
        if not math.isfinite(size) or abs(math.fsum(weights)) <= 4 * torch.finfo(torch.float64).eps * size:
            raise ValueError(f"weights must be finite and have a sum other than 0, got {list(weights)}")
    if dtype is not None and dtype not in AVERAGED:
        raise ValueError(f"dtype must be one of {', '.join(map(str, AVERAGED))}, got {dtype}")
    if progress and find_spec("tqdm") is None:
        raise ValueError("progress=True needs tqdm: pip install fastswa[progress]")


@contextmanager
def _bar(total: int | None) -> Iterator[Callable[[int], Any]]:
    if total is None:
        yield lambda count: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, desc="average", unit="B", unit_scale=True) as bar:
        yield bar.update
