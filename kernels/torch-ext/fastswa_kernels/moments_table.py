"""Tables of addresses for the kernels of running moments and of samples.

A row stands for a chunk of one tensor: the address of what the moments are of (the source that is read, or the target
that is written), the number of elements, the number of the first element through the list, the addresses of mean,
variance and K deviations. Rows whose addresses and length allow wide accesses come first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from .moments_arguments import named_slots
from .table import LaunchConfig, addresses, cut, layout_refusal, refusal


@dataclass(frozen=True)
class MomentsRows:
    """The rows of one launch. Holds addresses, keeps no tensor alive.

    Args:
        table: int64 rows on the device of the tensors.
        aligned_rows: how many of the rows, the first, are accessed in 128-bit pieces.
        compute: dtype of the arithmetic.
        constants: of the kernel.
        config: shape of the launch.
    """

    table: Tensor
    aligned_rows: int
    compute: torch.dtype
    constants: dict[str, Any]
    config: LaunchConfig

    def launch(self, kernel: Any, *arguments: object, **constants: object) -> None:
        """Launch a kernel on the current stream.

        Args:
            kernel: to be launched.
            arguments: of the kernel, after the table, its rows and its columns.
            constants: of the kernel, beside those of the pair of dtypes.
        """
        device, (rows, columns) = self.table.device, self.table.shape
        with torch.cuda.device(device if device.type == "cuda" else -1):
            kernel[(self.config.grid(rows, device),)](
                self.table,
                self.aligned_rows,
                rows,
                columns,
                *arguments,
                **constants,
                **self.constants,
                num_warps=self.config.num_warps,
            )


def specialisation(moment: torch.dtype, other: torch.dtype, role: str, config: LaunchConfig) -> dict[str, Any]:
    """The compile-time constants of a kernel for a pair of dtypes.

    Args:
        moment: dtype of means, variances and deviations.
        other: dtype of what they are of.
        role: what that is called in the kernel, SOURCE or TARGET.
        config: shape of the launch.

    Returns:
        Constants by name; the wider dtype is accessed in pieces of 16 bytes, the narrower in as many elements.
    """
    return {
        "MOMENT": getattr(tl, str(moment).removeprefix("torch.")),
        role: getattr(tl, str(other).removeprefix("torch.")),
        "VECTOR": 16 // max(moment.itemsize, other.itemsize),
        "MOMENT_BYTES": moment.itemsize,
        f"{role}_BYTES": other.itemsize,
        # Numbers of float64 take two registers, and their square root is a call that leaves few.
        "BLOCK": config.block // (2 if compute_dtype(moment, other) == torch.float64 else 1),
    }


def compute_dtype(moment: torch.dtype, other: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic: float64 where either dtype is, else float32."""
    return torch.float64 if torch.float64 in (moment, other) else torch.float32


def prepare(
    others: Sequence[Tensor],
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    deviations: Sequence[Sequence[Tensor]],
    indices: Sequence[int],
    role: str,
    config: LaunchConfig | None = None,
) -> list[MomentsRows]:
    """The rows of every launch.

    Args:
        others: what the moments are of.
        means: one for each.
        variances: likewise.
        deviations: K lists.
        indices: of the tensors that take part. The elements of the others are numbered too.
        role: SOURCE where `others` are read, TARGET where they are written.
        config: the launches' shape; chosen from the number of elements where left out.

    Returns:
        Rows for each device and pair of dtypes.

    Raises:
        ValueError: names the first tensor that a kernel can't walk in the order of its mean's memory.
    """
    lists = [(f"{role.lower()}s", others), ("means", means), ("variances", variances), *named_slots(deviations)]
    members_of: dict[tuple[torch.device, torch.dtype, torch.dtype], list[int]] = {}
    for index in indices:
        mean = means[index]
        for name, tensors in (lists[1], lists[0], *lists[2:]):
            reason = refusal(mean.device) or layout_refusal(mean, tensors[index])
            if reason:
                raise ValueError(f"{name}[{index}]: {reason}")
        if mean.numel():
            members_of.setdefault((mean.device, mean.dtype, others[index].dtype), []).append(index)
    numbers = np.array(list(accumulate((mean.numel() for mean in means), initial=0)), dtype=np.int64)
    launches = []
    for (device, moment, other), members in members_of.items():
        counts = np.array([means[index].numel() for index in members], dtype=np.int64)
        chosen = config or LaunchConfig.for_elements(int(counts.sum()))
        tensor_of_row, first = cut(counts, chosen.chunk)
        origin, *columns = (
            addresses([tensors[index] for index in members], tensor_of_row, first) for _, tensors in lists
        )
        count = np.minimum(chosen.chunk, counts[tensor_of_row] - first)
        constants = specialisation(moment, other, role, chosen)
        vector = constants["VECTOR"]
        narrow = (count % vector != 0) | (origin % (vector * other.itemsize) != 0)
        for column in columns:
            narrow |= column % (vector * moment.itemsize) != 0
        rows = np.stack([origin, count, numbers[members][tensor_of_row] + first, *columns], axis=1)
        rows = rows[np.argsort(narrow, kind="stable")]
        launches.append(
            MomentsRows(
                torch.from_numpy(rows).to(device),
                int(np.count_nonzero(~narrow)),
                compute_dtype(moment, other),
                constants,
                chosen,
            )
        )
    return launches
