"""The weighted sum of N lists of tensors: one launch for all tensors of a device and pair of dtypes.

Bytes moved for each element: read N sources, write the target = 4N + 4 (float32), 2N + 2 (bfloat16). A source of
coefficient 0 is not read. There is no reuse, so the floor is those bytes over the memory bandwidth: at 4.3 TB/s and
N = 2 71 us for ResNet-50 in float32, 347 us for GPT-2 124M. The conversion and the fused multiply-add in float64 that
each source costs stay below that where float64 runs at half the rate of float32, as on data-centre GPUs; where it runs
at a 64th they may not.

The sum of a block stays in registers while a loop, whose length is known at run time only, adds one source after
another: one compiled kernel serves every N. A program takes rows of the table in turn. Rows where all addresses and the
length allow it stand first, and the wider of the two dtypes is accessed there in 128-bit pieces; rows of slices at odd
offsets take the scalar branch. The branch is uniform in a program.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _combine_row(
    entry,
    coefficients,
    sources,
    TARGET: tl.constexpr,
    SOURCE: tl.constexpr,
    VECTOR: tl.constexpr,
    TARGET_BYTES: tl.constexpr,
    SOURCE_BYTES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # The hints belong on the loaded pointers, in bytes: on kernel arguments they are not enough.
    target = tl.multiple_of(tl.load(entry).to(tl.pointer_type(TARGET)), VECTOR * TARGET_BYTES)
    # In pieces of VECTOR: it is equal to the count, in a form whose divisibility the compiler sees.
    count = (tl.load(entry + 1).to(tl.int32) // VECTOR) * VECTOR
    offsets = tl.arange(0, BLOCK)
    start = tl.full([], 0, tl.int32)
    while start < count:
        here = tl.multiple_of(start, BLOCK) + offsets
        # The bits of -0.0, the one number that leaves every x as it is. tl.full makes 0.0 of it.
        total = tl.full([BLOCK], -(1 << 63), tl.int64).to(tl.float64, bitcast=True)
        any_read = tl.full([], 0, tl.int32)
        k = tl.full([], 0, tl.int32)
        while k < sources:
            coefficient = tl.load(coefficients + k)
            address = tl.load(entry + 2 + k)
            if coefficient != 0.0:
                source = tl.multiple_of(address.to(tl.pointer_type(SOURCE)), VECTOR * SOURCE_BYTES)
                total += coefficient * tl.load(source + here, mask=here < count).to(tl.float64)
                any_read = any_read + 1
            k += 1
        total = tl.where(any_read == 0, 0.0, total)
        if TARGET_BYTES == 2:
            # No device converts float64 to bfloat16 directly, and PyTorch takes this way to float16 too.
            tl.store(target + here, total.to(tl.float32).to(TARGET), mask=here < count)
        else:
            tl.store(target + here, total.to(TARGET), mask=here < count)
        start += BLOCK


@triton.jit(do_not_specialize=["aligned_rows", "rows", "coefficients", "sources"])
def combine_kernel(
    table,
    aligned_rows,
    rows,
    coefficients,
    sources,
    TARGET: tl.constexpr,
    SOURCE: tl.constexpr,
    VECTOR: tl.constexpr,
    TARGET_BYTES: tl.constexpr,
    SOURCE_BYTES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    while row < rows:
        # int64 before the multiplication: a table may hold more than 2^31 / (2 + N) rows.
        entry = table + (tl.full([], 2, tl.int64) + sources) * row
        if row < aligned_rows:
            _combine_row(entry, coefficients, sources, TARGET, SOURCE, VECTOR, TARGET_BYTES, SOURCE_BYTES, BLOCK)
        else:
            # Of another length: two sums that start from the same constant would get one layout, that of wide accesses.
            _combine_row(entry, coefficients, sources, TARGET, SOURCE, 1, TARGET_BYTES, SOURCE_BYTES, BLOCK // 2)
        row += tl.num_programs(0)
