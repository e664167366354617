"""The update of averages: one launch moves every average of a model, or several averages of each source.

Bytes moved for each element: read source, then read and write each of K averages = 8K + 4 (float32), 8K + 2 (float32
averages of bfloat16 weights), 4K + 2 (bfloat16). An average of weight 0 is neither read nor written, so that one which
is not due, or a slot of a ring, costs no traffic; where all weights are 0 the source isn't read either. There is no
reuse, so the floor is those bytes over the memory bandwidth: at 4.3 TB/s and K = 1 71 us for ResNet-50 in float32,
347 us for GPT-2 124M. Below about 4 M elements the launch itself is the floor.

A program takes rows of the table in turn. Where all addresses and the row's length allow, the wider of the two dtypes
is accessed in 128-bit pieces; slices at odd offsets take the scalar branch. The branch is uniform in a program.
"""

# Tuples that grow while the compiler unrolls a loop have no type that mypy knows.
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl

from .rounding_kernel import average_key, element_hash, round_stochastically, step_key


@triton.jit
def _lerp(average, source, weight):
    difference = source - average
    blended = tl.where(tl.abs(weight) < 0.5, average + weight * difference, source - difference * (1.0 - weight))
    # A select, because 0 * NaN would let a NaN in a never-written average survive the first update.
    return tl.where(weight == 1.0, source, blended)


@triton.jit
def _lerp_block(averages, source, here, count, counts, weights, element, key, FIRST: tl.constexpr, K: tl.constexpr):
    new = tl.load(source + here, mask=here < count).to(weights[0].dtype)
    hashed = None
    if key is not None:
        hashed = element_hash(element + here, key)
    # Every load before any store, which the compiler would not move a load across.
    olds = ()
    for k in tl.static_range(K):
        average = averages[k]
        olds += (tl.load(average + here, mask=here < counts[k]),)
    for k in tl.static_range(K):
        average = averages[k]
        result = _lerp(olds[k].to(weights[k].dtype), new, weights[k])
        if key is not None:
            result = round_stochastically(
                result.to(tl.float32), hashed, average_key(key, FIRST + k), average.dtype.element_ty
            )
        elif average.dtype.element_ty == tl.bfloat16:
            # No device converts float64 to bfloat16 directly.
            result = result.to(tl.float32)
        tl.store(average + here, result.to(average.dtype.element_ty), mask=here < counts[k])


@triton.jit
def _lerp_row(
    averages,
    source,
    count,
    weights,
    due,
    element,
    key,
    FIRST: tl.constexpr,
    K: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # With the count of its row, or 0, each average needs no flag beside its mask. In pieces of VECTOR: they are equal
    # to the counts, in a form whose divisibility the compiler sees; without it every access is scalar.
    pieces = count // VECTOR
    longest = pieces * 0
    counts = ()
    for k in tl.static_range(K):
        here_due = pieces * due[k]
        longest = tl.maximum(longest, here_due)
        counts += (here_due * VECTOR,)
    count = longest * VECTOR
    offsets = tl.arange(0, BLOCK)
    start = tl.full([], 0, tl.int32)
    while start < count:
        here = tl.multiple_of(start, BLOCK) + offsets
        _lerp_block(averages, source, here, count, counts, weights, element, key, FIRST, K)
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


@triton.jit(do_not_specialize=["lerp_rows", "rows", "key"])
def lerp_kernel(
    table,
    lerp_rows,
    rows,
    weights,
    key,
    step,
    skip,
    WEIGHT_IS_TENSOR: tl.constexpr,
    IDLE_AT_ZERO: tl.constexpr,
    FIRST: tl.constexpr,
    K: tl.constexpr,
    AVERAGE: tl.constexpr,
    SOURCE: tl.constexpr,
    COMPUTE: tl.constexpr,
    VECTOR: tl.constexpr,
    AVERAGE_BYTES: tl.constexpr,
    SOURCE_BYTES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if skip is not None:
        rows = tl.where(tl.load(skip) == 0, rows, 0)
    if key is not None:
        key = key.to(tl.uint32)
        if step is not None:
            key = step_key(key, tl.load(step))
    ws, due = (), ()
    for k in tl.static_range(K):
        if WEIGHT_IS_TENSOR:  # noqa: SIM108, a conditional expression would trace both sides
            w = tl.load(weights + k).to(COMPUTE)
        else:
            w = tl.full([], 1, COMPUTE) * weights[k]
        ws += (w,)
        if IDLE_AT_ZERO:
            due += (tl.where(w == 0.0, 0, 1),)
        else:
            due += (1,)

    row = tl.program_id(0)
    while row < rows:
        # int64 before the multiplication: a table may hold more than 2^31 / (3 + K) rows.
        entry = table + tl.full([], 3 + K, tl.int64) * row
        origin = tl.load(entry)
        count = tl.load(entry + 1).to(tl.int32)
        if row < lerp_rows:
            element = tl.load(entry + 2)
            source = origin.to(tl.pointer_type(SOURCE))
            aligned = (origin % (VECTOR * SOURCE_BYTES) == 0) & (count % VECTOR == 0)
            # The hints belong on the loaded pointers, in bytes: on kernel arguments they are not enough.
            aligned_source = tl.multiple_of(source, VECTOR * SOURCE_BYTES)
            averages, aligned_averages = (), ()
            for k in tl.static_range(K):
                to = tl.load(entry + 3 + k)
                aligned = aligned & (to % (VECTOR * AVERAGE_BYTES) == 0)
                average = to.to(tl.pointer_type(AVERAGE))
                averages += (average,)
                aligned_averages += (tl.multiple_of(average, VECTOR * AVERAGE_BYTES),)
            if aligned:
                _lerp_row(aligned_averages, aligned_source, count, ws, due, element, key, FIRST, K, VECTOR, BLOCK)
            else:
                # Every element has a mask of its own here: fewer of them keep many averages in registers.
                _lerp_row(averages, source, count, ws, due, element, key, FIRST, K, 1, BLOCK // (1 if K <= 2 else 4))
        else:
            to = tl.load(entry + 3)
            target_bytes = to.to(tl.pointer_type(tl.uint8))
            source_bytes = origin.to(tl.pointer_type(tl.uint8))
            if (to % 16 == 0) & (origin % 16 == 0) & (count % 16 == 0):
                _copy_row(tl.multiple_of(target_bytes, 16), tl.multiple_of(source_bytes, 16), count, True, 4 * BLOCK)
            else:
                _copy_row(target_bytes, source_bytes, count, False, 4 * BLOCK)
        row += tl.num_programs(0)
