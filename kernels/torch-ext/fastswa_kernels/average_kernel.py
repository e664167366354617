"""The update of averages: one launch moves every average of a model towards its source.

Bytes moved for each element: read average + read source + write average = 12 (float32), 10 (float32 average of
bfloat16 weights), 6 (bfloat16). There is no reuse, so the floor is those bytes over the memory bandwidth: at 4.3 TB/s
71 us for ResNet-50 in float32, 347 us for GPT-2 124M. Below about 4 M elements the launch itself is the floor.

A program takes rows of the table in turn. Where both addresses and the row's length allow, the wider of the two
tensors is accessed in 128-bit pieces; slices at odd offsets take the scalar branch. The branch is uniform in a program.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

_TRITON_DTYPE = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
}


@triton.jit
def _lerp(average, source, weight):
    difference = source - average
    blended = tl.where(tl.abs(weight) < 0.5, average + weight * difference, source - difference * (1.0 - weight))
    # A select, because 0 * NaN would let a NaN in a never-written average survive the first update.
    return tl.where(weight == 1.0, source, blended)


@triton.jit
def _lerp_block(average, source, offsets, mask, weight):
    old = tl.load(average + offsets, mask=mask).to(weight.dtype)
    new = tl.load(source + offsets, mask=mask).to(weight.dtype)
    result = _lerp(old, new, weight)
    if average.dtype.element_ty == tl.bfloat16:
        # No device converts float64 to bfloat16 directly.
        result = result.to(tl.float32)
    tl.store(average + offsets, result.to(average.dtype.element_ty), mask=mask)


@triton.jit
def _lerp_row(average, source, count, weight, ALIGNED: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    start = tl.full([], 0, tl.int32)
    if ALIGNED:
        # Equal to count, in a form whose divisibility the compiler sees; without it every access is scalar.
        count = (count // VECTOR) * VECTOR
    while start < count:
        here = tl.multiple_of(start, BLOCK) + offsets
        _lerp_block(average, source, here, here < count, weight)
        start += BLOCK


@triton.jit
def _copy_row(target, source, count, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    start = tl.full([], 0, tl.int32)
    if ALIGNED:
        count = (count // 16) * 16
    while start < count:
        here = tl.multiple_of(start, BLOCK) + offsets
        tl.store(target + here, tl.load(source + here, mask=here < count), mask=here < count)
        start += BLOCK


@triton.jit(do_not_specialize=["lerp_rows", "rows"])
def lerp_kernel(
    table,
    lerp_rows,
    rows,
    weight,
    WEIGHT_IS_TENSOR: tl.constexpr,
    AVERAGE: tl.constexpr,
    SOURCE: tl.constexpr,
    COMPUTE: tl.constexpr,
    VECTOR: tl.constexpr,
    AVERAGE_BYTES: tl.constexpr,
    SOURCE_BYTES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if WEIGHT_IS_TENSOR:  # noqa: SIM108, a conditional expression would trace both sides
        w = tl.load(weight).to(COMPUTE)
    else:
        w = tl.full([], 1, COMPUTE) * weight
    row = tl.program_id(0)
    while row < rows:
        # int64 before the multiplication: a table may hold more than 2^31 / 3 rows.
        entry = table + tl.full([], 3, tl.int64) * row
        to = tl.load(entry)
        origin = tl.load(entry + 1)
        count = tl.load(entry + 2).to(tl.int32)
        if row < lerp_rows:
            average = to.to(tl.pointer_type(AVERAGE))
            source = origin.to(tl.pointer_type(SOURCE))
            # The hints belong on the loaded pointers, in bytes: on kernel arguments they are not enough.
            if (to % (VECTOR * AVERAGE_BYTES) == 0) & (origin % (VECTOR * SOURCE_BYTES) == 0) & (count % VECTOR == 0):
                aligned_average = tl.multiple_of(average, VECTOR * AVERAGE_BYTES)
                aligned_source = tl.multiple_of(source, VECTOR * SOURCE_BYTES)
                _lerp_row(aligned_average, aligned_source, count, w, True, VECTOR, BLOCK)
            else:
                _lerp_row(average, source, count, w, False, VECTOR, BLOCK)
        else:
            target_bytes = to.to(tl.pointer_type(tl.uint8))
            source_bytes = origin.to(tl.pointer_type(tl.uint8))
            if (to % 16 == 0) & (origin % 16 == 0) & (count % 16 == 0):
                _copy_row(tl.multiple_of(target_bytes, 16), tl.multiple_of(source_bytes, 16), count, True, 4 * BLOCK)
            else:
                _copy_row(target_bytes, source_bytes, count, False, 4 * BLOCK)
        row += tl.num_programs(0)


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
    """One launch of `lerp_kernel`, everything but the weight settled. Holds addresses, keeps no tensor alive.

    Args:
        table: int64 rows on the device of the tensors (`table.build`).
        lerp_rows: how many of the rows are averages; the rest are copies.
        grid: programs to start.
        constants: of the kernel (`specialisation`, and BLOCK).
        num_warps: of each program.
    """

    table: Tensor
    lerp_rows: int
    grid: int
    constants: dict[str, object]
    num_warps: int

    def run(self, weight: float | Tensor) -> None:
        """Launch on the current stream.

        Args:
            weight: a float, or a 0-dimensional floating tensor, best on the table's device.
        """
        device = self.table.device
        if isinstance(weight, Tensor):
            weight = weight.to(device)
        elif self.constants["COMPUTE"] is tl.float64:
            # Triton passes a float as float32, which would round the weight of a float64 average.
            weight = torch.full((), weight, dtype=torch.float64, device=device)
        else:
            # An int would make Triton compile for its value.
            weight = float(weight)
        with torch.cuda.device(device if device.type == "cuda" else -1):
            lerp_kernel[(self.grid,)](
                self.table,
                self.lerp_rows,
                self.table.shape[0],
                weight,
                WEIGHT_IS_TENSOR=isinstance(weight, Tensor),
                num_warps=self.num_warps,
                **self.constants,
            )
