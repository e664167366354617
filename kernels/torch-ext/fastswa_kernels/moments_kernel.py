"""Running moments: one launch takes a model into the means and variances of all its weights.

Bytes moved for each element: read source, read and write mean and variance = 20 (float32), 18 (float32 moments of
bfloat16 weights), and 4 more to write the deviation. There is no reuse, so the floor is those bytes over the memory
bandwidth: at 4.3 TB/s 143 us with the deviation for ResNet-50 in float32, 694 us for GPT-2 124M. As operations on whole
tensors the same takes 52 bytes and five launches.

A row of the table has the addresses of all slots of a ring of deviations; which of them is written, if any, is known at
run time. A program takes rows in turn. Rows where all addresses and the length allow it stand first, and the wider of
the two dtypes is accessed there in 128-bit pieces; the others take the scalar branch, uniform in a program.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _store(pointer, x, mask):
    if pointer.dtype.element_ty == tl.bfloat16:
        # No device converts float64 to bfloat16 directly.
        x = x.to(tl.float32)
    tl.store(pointer, x.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _moments_row(
    entry,
    slot,
    w,
    MOMENT: tl.constexpr,
    SOURCE: tl.constexpr,
    VECTOR: tl.constexpr,
    MOMENT_BYTES: tl.constexpr,
    SOURCE_BYTES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # The hints belong on the loaded pointers, in bytes: on kernel arguments they are not enough.
    sources = tl.multiple_of(tl.load(entry).to(tl.pointer_type(SOURCE)), VECTOR * SOURCE_BYTES)
    means = tl.multiple_of(tl.load(entry + 3).to(tl.pointer_type(MOMENT)), VECTOR * MOMENT_BYTES)
    variances = tl.multiple_of(tl.load(entry + 4).to(tl.pointer_type(MOMENT)), VECTOR * MOMENT_BYTES)
    if slot is not None:
        deviations = tl.multiple_of(tl.load(entry + 5 + slot).to(tl.pointer_type(MOMENT)), VECTOR * MOMENT_BYTES)
    # In pieces of VECTOR: it is equal to the count, in a form whose divisibility the compiler sees.
    count = (tl.load(entry + 1).to(tl.int32) // VECTOR) * VECTOR
    offsets = tl.arange(0, BLOCK)
    start = tl.full([], 0, tl.int32)
    while start < count:
        here = tl.multiple_of(start, BLOCK) + offsets
        mask = here < count
        new = tl.load(sources + here, mask=mask).to(w.dtype)
        old = tl.load(means + here, mask=mask).to(w.dtype)
        variance = tl.load(variances + here, mask=mask).to(w.dtype)
        distance = new - old
        moved = tl.where(w < 0.5, old + w * distance, new - distance * (1.0 - w))
        spread = (1.0 - w) * (variance + w * distance * distance)
        # Selects, because 0 * NaN would let a NaN in never-written memory survive the first model.
        _store(means + here, tl.where(w == 1.0, new, moved), mask)
        _store(variances + here, tl.where(w == 1.0, 0.0, spread), mask)
        if slot is not None:
            _store(deviations + here, tl.where(w == 1.0, 0.0, (1.0 - w) * distance), mask)
        start += BLOCK


@triton.jit(do_not_specialize=["aligned_rows", "rows", "columns", "slot", "weight"])
def moments_kernel(
    table,
    aligned_rows,
    rows,
    columns,
    slot,
    weight,
    WEIGHT_IS_TENSOR: tl.constexpr,
    MOMENT: tl.constexpr,
    SOURCE: tl.constexpr,
    COMPUTE: tl.constexpr,
    VECTOR: tl.constexpr,
    MOMENT_BYTES: tl.constexpr,
    SOURCE_BYTES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if WEIGHT_IS_TENSOR:  # noqa: SIM108, a conditional expression would trace both sides
        w = tl.load(weight).to(COMPUTE)
    else:
        w = tl.full([], 1, COMPUTE) * weight
    row = tl.program_id(0)
    while row < rows:
        # int64 before the multiplication: a table may hold more than 2^31 / columns rows.
        entry = table + (tl.full([], 0, tl.int64) + columns) * row
        if row < aligned_rows:
            _moments_row(entry, slot, w, MOMENT, SOURCE, VECTOR, MOMENT_BYTES, SOURCE_BYTES, BLOCK)
        else:
            # Of another length: what both branches make of the weight would get one layout, that of wide accesses.
            _moments_row(entry, slot, w, MOMENT, SOURCE, 1, MOMENT_BYTES, SOURCE_BYTES, BLOCK // 2)
        row += tl.num_programs(0)
