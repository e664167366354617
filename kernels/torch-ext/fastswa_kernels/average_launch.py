"""One launch of the update of averages, everything but the weights settled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from .average_kernel import lerp_kernel
from .rounding import StochasticRounding, seed_key, step_key

MOST_AVERAGES = 8
"""How many averages of a source one launch may move: more would not fit into a thread's registers."""

_TRITON_DTYPE = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
}


def specialisation(average: torch.dtype, source: torch.dtype) -> dict[str, object]:
    """The compile-time constants of `lerp_kernel` for a pair of dtypes.

    Args:
        average: dtype of the averages.
        source: dtype of the sources.

    Returns:
        Constants by name; the wider dtype is accessed in pieces of 16 bytes, the narrower in as many elements.
    """
    wide = torch.float64 in (average, source)
    return {
        "AVERAGE": _TRITON_DTYPE[average],
        "SOURCE": _TRITON_DTYPE[source],
        "COMPUTE": tl.float64 if wide else tl.float32,
        "VECTOR": 16 // max(average.itemsize, source.itemsize),
        "AVERAGE_BYTES": average.itemsize,
        "SOURCE_BYTES": source.itemsize,
    }


@dataclass(frozen=True)
class Launch:
    """One launch of `lerp_kernel`. Holds addresses, keeps no tensor alive.

    Args:
        table: int64 rows on the device of the tensors (`table.build`).
        lerp_rows: how many of the rows are averages; the rest are copies.
        grid: programs to start.
        first: number of the launch's first average among those that follow a source.
        averages: how many of them the launch moves.
        constants: of the kernel (`specialisation`, BLOCK and IDLE_AT_ZERO).
        num_warps: of each program.
    """

    table: Tensor
    lerp_rows: int
    grid: int
    first: int
    averages: int
    constants: dict[str, object]
    num_warps: int

    def run(
        self, weights: Sequence[float] | Tensor, rounding: StochasticRounding | None = None, skip: Tensor | None = None
    ) -> None:
        """Launch on the current stream.

        Args:
            weights: one for each average that follows a source, those of other launches too: floats, or a floating
                tensor of one dimension, best on the table's device.
            rounding: of bfloat16 and float16 averages; None rounds to the nearest.
            skip: a tensor of one element, best on the table's device: where it isn't 0 nothing is written.
        """
        device = self.table.device
        key, step = self._key(rounding)
        with torch.cuda.device(device if device.type == "cuda" else -1):
            lerp_kernel[(self.grid,)](
                self.table,
                self.lerp_rows,
                self.table.shape[0],
                self._weights(weights),
                key,
                step,
                None if skip is None else skip.to(device),
                WEIGHT_IS_TENSOR=isinstance(weights, Tensor) or self.constants["COMPUTE"] is tl.float64,
                FIRST=self.first,
                K=self.averages,
                num_warps=self.num_warps,
                **self.constants,
            )

    def _weights(self, weights: Sequence[float] | Tensor) -> tuple[float, ...] | Tensor:
        device, mine = self.table.device, weights[self.first : self.first + self.averages]
        if isinstance(mine, Tensor):
            return mine.to(device).contiguous()
        if self.constants["COMPUTE"] is not tl.float64:
            # An int would make Triton compile for its value.
            return tuple(map(float, mine))
        # Triton passes a float as float32, which would round the weight of a float64 average. Filled, not copied from
        # the host: a copy would wait for the device.
        wide = torch.empty(len(mine), dtype=torch.float64, device=device)
        for slot, weight in zip(wide, mine, strict=True):
            slot.fill_(float(weight))
        return wide

    def _key(self, rounding: StochasticRounding | None) -> tuple[int | None, Tensor | None]:
        if rounding is None or self.constants["AVERAGE"] not in (tl.bfloat16, tl.float16):
            return None, None
        key = seed_key(rounding.seed)
        if isinstance(rounding.step, Tensor):
            return key, rounding.step.to(self.table.device)
        return step_key(key, rounding.step), None
