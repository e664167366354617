"""Weighted sums of lists of tensors, in one launch for each device and pair of dtypes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton.language as tl
from torch import Tensor

from .combine_arguments import check_combine
from .combine_kernel import combine_kernel
from .pairs import dense_like, dense_view
from .table import LaunchConfig, addresses, cut, layout_refusal, refusal

BLOCK_BYTES = 4096
"""Bytes of a source that a program reads at once: 32 on their way to each thread, as few would not hide the memory's
latency in a loop over sources."""


@torch.no_grad()
def combine_(
    targets: Sequence[Tensor], sources: Sequence[Sequence[Tensor]], coefficients: Sequence[float] | Tensor
) -> None:
    r"""Make each target a weighted sum of its sources, in one launch for each device and pair of dtypes.

    .. math:: t_i \leftarrow \sum_{k:\, c_k \ne 0} c_k\, p_{ki}

    `fastswa_kernels.reference.combine_` is the specification: arithmetic in float64, one rounding to the target's
    dtype. Any number of sources is read once each by the same compiled kernel.

    Args:
        targets: CUDA tensors of float32, bfloat16, float16 or float64; any shape and offset; written. A target may be
            one of its own sources. One with gaps between its elements is written through a dense copy.
        sources: N lists; sources[k][i] is of the shape of targets[i]; any of those dtypes, but one for all sources of a
            target. A source with other strides than its target or on another device is first copied into its layout.
        coefficients: N finite floats, or a floating tensor of shape (N,) on the targets' device, best of float64, read
            there. A source of coefficient 0 is not read.

    Raises:
        ValueError: no list of sources, lists of different length, shapes that differ, sources of one target of
            different dtype or device, memory that overlaps, coefficients of another number or not finite.
        TypeError: a dtype that is not one of the four, coefficients of another type. Nothing has been written in any of
            these cases.

    Example:
        >>> first, second = [torch.zeros(1000, device="cuda")], [torch.ones(1000, device="cuda")]
        >>> target = [torch.empty(1000, device="cuda")]
        >>> combine_(target, [first, second], [0.75, 0.25])
        >>> target[0][0].item()
        0.25

    References:
        Wortsman et al. 2022, Model soups: averaging weights of multiple fine-tuned models improves accuracy without
        increasing inference time, section 2.
    """
    indices = [index for index in check_combine(targets, sources, coefficients) if targets[index].numel()]
    members_of: dict[tuple[torch.device, torch.dtype, torch.dtype], list[list[Tensor]]] = {}
    back = []
    for index in indices:
        reason = refusal(targets[index].device)
        if reason:
            raise ValueError(f"targets[{index}]: {reason}")
    for index in indices:
        given, row = targets[index], [tensors[index] for tensors in sources]
        target = given if dense_view(given) is not None else dense_like(given, given.dtype)
        if target is not given:
            back.append((given, target))
        row = [
            dense_like(target, source.dtype).copy_(source) if layout_refusal(target, source) else source
            for source in row
        ]
        members_of.setdefault((target.device, target.dtype, row[0].dtype), []).append([target, *row])
    for (device, target_dtype, source_dtype), rows in members_of.items():
        _launch(rows, _on(device, coefficients), specialisation(target_dtype, source_dtype))
    for given, target in back:
        given.copy_(target)


def specialisation(target: torch.dtype, source: torch.dtype) -> dict[str, Any]:
    """The compile-time constants of `combine_kernel` for a pair of dtypes.

    Args:
        target: dtype of the targets.
        source: dtype of the sources.

    Returns:
        Constants by name; the wider dtype is accessed in pieces of 16 bytes, the narrower in as many elements.
    """
    return {
        "TARGET": getattr(tl, str(target).removeprefix("torch.")),
        "SOURCE": getattr(tl, str(source).removeprefix("torch.")),
        "VECTOR": 16 // max(target.itemsize, source.itemsize),
        "TARGET_BYTES": target.itemsize,
        "SOURCE_BYTES": source.itemsize,
        "BLOCK": BLOCK_BYTES // source.itemsize,
    }


def _on(device: torch.device, coefficients: Sequence[float] | Tensor) -> Tensor:
    if isinstance(coefficients, Tensor):
        return coefficients.to(device, torch.float64).contiguous()
    # From pinned memory: a copy from any other would wait for the device.
    values = torch.tensor(coefficients, dtype=torch.float64, pin_memory=device.type == "cuda")
    return values.to(device, non_blocking=True)


def _launch(rows: Sequence[Sequence[Tensor]], coefficients: Tensor, constants: dict[str, Any]) -> None:
    """Sum rows of dense tensors, a target and its sources, whose dtypes and device are one."""
    device, config = coefficients.device, LaunchConfig.for_elements(sum(row[0].numel() for row in rows))
    table, aligned_rows = _table(rows, config.chunk, constants)
    with torch.cuda.device(device if device.type == "cuda" else -1):
        combine_kernel[(config.grid(len(table), device),)](
            torch.from_numpy(table).to(device),
            aligned_rows,
            len(table),
            coefficients,
            len(coefficients),
            **constants,
            num_warps=config.num_warps,
        )


def _table(
    rows: Sequence[Sequence[Tensor]], chunk: int, constants: dict[str, Any]
) -> tuple[npt.NDArray[np.int64], int]:
    """Target address, count and source addresses of each chunk; and how many chunks, the first, allow wide accesses."""
    counts = np.array([row[0].numel() for row in rows], dtype=np.int64)
    tensor_of_row, first = cut(counts, chunk)
    target, *sources = (addresses(column, tensor_of_row, first) for column in zip(*rows, strict=True))
    count = np.minimum(chunk, counts[tensor_of_row] - first)
    vector = constants["VECTOR"]
    narrow = (count % vector != 0) | (target % (vector * constants["TARGET_BYTES"]) != 0)
    for column in sources:
        narrow |= column % (vector * constants["SOURCE_BYTES"]) != 0
    order = np.argsort(narrow, kind="stable")
    return np.stack([target, count, *sources], axis=1)[order], int(np.count_nonzero(~narrow))
