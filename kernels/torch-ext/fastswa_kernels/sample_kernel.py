"""Samples of a normal distribution: one launch draws all weights of a model.

Bytes moved for each element: read the mean, the variance and K deviations, write the target = 4 (3 + K) (float32); a
diagonal of 0 reads no variances and draws nothing. There is no reuse, so the floor is those bytes over the memory
bandwidth: at 4.3 TB/s and K = 20 0.55 ms for ResNet-50 in float32, 2.7 ms for GPT-2 124M. A normal number costs
about 80 instructions (counted in the code for sm_90, not timed), which take an H100 as long as 10 to 20 bytes: from
K = 2 on they hide behind the memory, without deviations they may be the bound.

The sum of a block stays in registers while a loop, whose length is known at run time only, adds one deviation after
another: one compiled kernel serves every K. A program takes rows of the table in turn, aligned ones first, as in
`moments_kernel.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .normal_kernel import normal


@triton.jit
def _draw_row(
    entry,
    columns,
    numbers,
    key,
    DIAGONAL: tl.constexpr,
    TARGET: tl.constexpr,
    MOMENT: tl.constexpr,
    VECTOR: tl.constexpr,
    TARGET_BYTES: tl.constexpr,
    MOMENT_BYTES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # The hints belong on the loaded pointers, in bytes: on kernel arguments they are not enough.
    targets = tl.multiple_of(tl.load(entry).to(tl.pointer_type(TARGET)), VECTOR * TARGET_BYTES)
    element = tl.load(entry + 2)
    means = tl.multiple_of(tl.load(entry + 3).to(tl.pointer_type(MOMENT)), VECTOR * MOMENT_BYTES)
    variances = tl.multiple_of(tl.load(entry + 4).to(tl.pointer_type(MOMENT)), VECTOR * MOMENT_BYTES)
    diagonal = tl.load(numbers)
    # In pieces of VECTOR: it is equal to the count, in a form whose divisibility the compiler sees.
    count = (tl.load(entry + 1).to(tl.int32) // VECTOR) * VECTOR
    offsets = tl.arange(0, BLOCK)
    start = tl.full([], 0, tl.int32)
    while start < count:
        here = tl.multiple_of(start, BLOCK) + offsets
        mask = here < count
        mean = tl.load(means + here, mask=mask).to(diagonal.dtype)
        if DIAGONAL:
            variance = tl.load(variances + here, mask=mask).to(diagonal.dtype)
            added = diagonal * tl.sqrt(variance) * normal(element + here, key).to(diagonal.dtype)
        else:
            added = tl.full([BLOCK], 0, diagonal.dtype)
        k = tl.full([], 5, tl.int32)
        while k < columns:
            deviations = tl.multiple_of(tl.load(entry + k).to(tl.pointer_type(MOMENT)), VECTOR * MOMENT_BYTES)
            coefficient = tl.load(numbers + k - 4)
            added += coefficient * tl.load(deviations + here, mask=mask).to(diagonal.dtype)
            k += 1
        total = mean + added
        if TARGET == tl.bfloat16:  # noqa: SIM300
            # No device converts float64 to bfloat16 directly.
            total = total.to(tl.float32)
        tl.store(targets + here, total.to(TARGET), mask=mask)
        start += BLOCK


@triton.jit(do_not_specialize=["aligned_rows", "rows", "columns", "numbers", "key"])
def sample_kernel(
    table,
    aligned_rows,
    rows,
    columns,
    numbers,
    key,
    DIAGONAL: tl.constexpr,
    TARGET: tl.constexpr,
    MOMENT: tl.constexpr,
    VECTOR: tl.constexpr,
    TARGET_BYTES: tl.constexpr,
    MOMENT_BYTES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    key = key.to(tl.uint32)
    row = tl.program_id(0)
    while row < rows:
        # int64 before the multiplication: a table may hold more than 2^31 / columns rows.
        entry = table + (tl.full([], 0, tl.int64) + columns) * row
        if row < aligned_rows:
            _draw_row(entry, columns, numbers, key, DIAGONAL, TARGET, MOMENT, VECTOR, TARGET_BYTES, MOMENT_BYTES, BLOCK)
        else:
            # Of another length: two sums that start from the same constant would get one layout, that of wide accesses.
            _draw_row(entry, columns, numbers, key, DIAGONAL, TARGET, MOMENT, 1, TARGET_BYTES, MOMENT_BYTES, BLOCK // 2)
        row += tl.num_programs(0)
