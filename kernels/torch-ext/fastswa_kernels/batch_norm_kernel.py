"""The statistics of BatchNorm: those of a layer's input, and the merge of all layers' into running moments.

`merge_batch_stats_kernel` moves 108 bytes for each channel of float32 statistics: its layer (4), mean and variance (8),
six float64 moments read and written (96); weights and counts of the layers stay in the cache. That is 2.9 MB for
ResNet-50's 26560 channels, 0.7 us at 4.3 TB/s: the launch is the floor. A layer that is left out moves 4 bytes a
channel.

`batch_stats` reads each element once, 4 bytes in float32, 2 in bfloat16: the floor is 96 us at 4.3 TB/s for what
ResNet-50's first convolution gives in bfloat16 at batch 256 (411 MB). Partial sums, 16 bytes for each program and
channel, are below 1 % of that. Below about 16 MB the two launches are the floor.

Why the variance is right wherever the mean is: a program takes the mean of its first tile as a pilot K, and sums x - K
and (x - K)^2. By Cauchy's inequality (mean - K)^2 <= variance * (tiles - 1), whatever the order of the values. So
sum (x - K)^2 is at most `tiles` times what is left when (sum (x - K))^2 / n is taken off it. What follows is float64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

MERGE_BLOCK = 128
"""Channels of a program that merges batches."""
MAX_TILES = 64
"""Tiles of a program at most: the factor by which rounding errors of the variance may grow."""
PARTIALS = {"ROWS": 256, "CHANNELS": 8}
"""The tile of a program that merges partial sums; of few channels, so that a layer of 64 still has 8 such programs."""
NUM_WARPS = 4
PARTIALS_NUM_WARPS = 8


@triton.jit
def _merge_row(mean, squares, value, weight, factor, mask):
    old = tl.load(mean, mask=mask)
    difference = value - old
    new = old + factor * difference
    tl.store(mean, new, mask=mask)
    tl.store(squares, tl.load(squares, mask=mask) + weight * difference * (value - new), mask=mask)


@triton.jit(do_not_specialize=["channels"])
def merge_batch_stats_kernel(
    moments,
    batch_mean,
    batch_var,
    weights,
    counts,
    layer_of_channel,
    nonfinite,
    channels,
    BLOCK: tl.constexpr,
):
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = channel < channels
    layer = tl.load(layer_of_channel + channel, mask=exists, other=0)
    weight = tl.load(weights + layer, mask=exists, other=0.0)
    # Channels of a layer that is left out are neither read nor written, so nothing they hold can matter.
    reached = exists & (weight > 0)
    count = tl.load(counts + layer, mask=reached)
    mean = tl.load(batch_mean + channel, mask=reached).to(tl.float64)
    var = tl.load(batch_var + channel, mask=reached).to(tl.float64)
    finite = (tl.abs(mean) < float("inf")) & (tl.abs(var) < float("inf"))
    # Channels of one layer may store here at once; they all store 1.
    tl.store(nonfinite + layer, 1, mask=reached & ~finite)

    # Masked lanes divide too: 1 keeps them from 0 / 0.
    row = moments + channel
    total = tl.load(row, mask=reached, other=0.0) + tl.where(reached, weight, 1.0)
    tl.store(row, total, mask=reached)
    factor = weight / total
    step = channels.to(tl.int64)
    _merge_row(row + step, row + 2 * step, mean, weight, factor, reached)
    _merge_row(row + 3 * step, row + 4 * step, var, weight, factor, reached)
    within = row + 5 * step
    tl.store(within, tl.load(within, mask=reached) + (count - 1.0) * var, mask=reached)


@triton.jit
def _load_groups(x, group, mask, plane_groups, plane_step, dtype: tl.constexpr, VECTOR: tl.constexpr):
    start = (group // plane_groups).to(tl.int64) * plane_step + group % plane_groups
    offsets = start[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    return tl.load(x + offsets, mask=mask[:, None], other=0.0).to(dtype)


@triton.jit(do_not_specialize=["channels", "plane_groups", "groups", "program_groups"])
def plane_stats_kernel(
    x,
    partials,
    channels,
    plane_groups,
    groups,
    program_groups,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dtype: tl.constexpr = partials.dtype.element_ty
    program = tl.program_id(0)
    first = (program // channels).to(tl.int64) * program_groups
    count = tl.minimum(groups - first, program_groups).to(tl.int32)
    # A group is VECTOR neighbours in a plane. Within the program they are counted from the start of its first plane.
    plane_step = plane_groups.to(tl.int64) * channels
    x += (first // plane_groups * plane_step + (program % channels).to(tl.int64) * plane_groups) * VECTOR
    group = (first % plane_groups).to(tl.uint32) + tl.arange(0, BLOCK).to(tl.uint32)
    plane_groups = plane_groups.to(tl.uint32)

    mask = tl.arange(0, BLOCK) < count
    values = _load_groups(x, group, mask, plane_groups, plane_step, dtype, VECTOR)
    pilot = tl.sum(tl.sum(values, 1), 0) / (tl.minimum(count, BLOCK) * VECTOR).to(dtype)
    size = tl.num_programs(0).to(tl.int64)
    partials += program
    tl.store(partials, (count * VECTOR).to(dtype))
    tl.store(partials + size, pilot)
    total = tl.zeros([BLOCK], dtype)
    squares = tl.zeros([BLOCK], dtype)
    start = tl.full([], 0, tl.int32)
    while start < count:
        mask = start + tl.arange(0, BLOCK) < count
        # The first tile comes a second time, from the cache.
        values = _load_groups(x, group + start.to(tl.uint32), mask, plane_groups, plane_step, dtype, VECTOR)
        difference = tl.where(mask[:, None], values - pilot, 0.0)
        total += tl.sum(difference, 1)
        squares += tl.sum(difference * difference, 1)
        start += BLOCK
    tl.store(partials + 2 * size, tl.sum(total, 0))
    tl.store(partials + 3 * size, tl.sum(squares, 0))


@triton.jit(do_not_specialize=["rows", "columns", "program_rows"])
def row_stats_kernel(
    x,
    partials,
    rows,
    columns,
    program_rows,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    dtype: tl.constexpr = partials.dtype.element_ty
    # Equal to columns, in a form whose divisibility the compiler sees; without it every access is scalar.
    columns = (columns // VECTOR) * VECTOR
    blocks = tl.cdiv(columns, COLUMNS)
    program = tl.program_id(0)
    split = (program // blocks).to(tl.int64)
    first = split * program_rows
    count = tl.minimum(rows - first, program_rows).to(tl.int32)
    column = (program % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.arange(0, ROWS)
    x += first * columns
    offsets = row[:, None].to(tl.int64) * columns + column[None, :]
    exists = (column < columns)[None, :]

    values = tl.load(x + offsets, mask=(row < count)[:, None] & exists, other=0.0).to(dtype)
    pilot = tl.sum(values, 0) / tl.minimum(count, ROWS).to(dtype)
    size = (tl.num_programs(0) // blocks).to(tl.int64) * columns
    to = partials + split * columns + column
    tl.store(to, count.to(dtype), mask=column < columns)
    tl.store(to + size, pilot, mask=column < columns)
    total = tl.zeros([ROWS, COLUMNS], dtype)
    squares = tl.zeros([ROWS, COLUMNS], dtype)
    start = tl.full([], 0, tl.int32)
    while start < count:
        mask = (start + row < count)[:, None] & exists
        # The first tile comes a second time, from the cache.
        values = tl.load(x + start.to(tl.int64) * columns + offsets, mask=mask, other=0.0).to(dtype)
        difference = tl.where(mask, values - pilot[None, :], 0.0)
        total += difference
        squares += difference * difference
        start += ROWS
    tl.store(to + 2 * size, tl.sum(total, 0), mask=column < columns)
    tl.store(to + 3 * size, tl.sum(squares, 0), mask=column < columns)


@triton.jit(do_not_specialize=["rows", "channels", "count"])
def merge_partials_kernel(partials, mean, m2, rows, channels, count, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    exists = channel < channels
    size = rows.to(tl.int64) * channels
    pilot = tl.load(partials + size + channel, mask=exists).to(tl.float64)
    weighted = tl.zeros([ROWS, CHANNELS], tl.float64)
    squared = tl.zeros([ROWS, CHANNELS], tl.float64)
    start = tl.full([], 0, tl.int32)
    while start < rows:
        row = start + tl.arange(0, ROWS)
        offsets = row[:, None].to(tl.int64) * channels + channel[None, :]
        mask = (row < rows)[:, None] & exists[None, :]
        n = tl.load(partials + offsets, mask=mask, other=1.0).to(tl.float64)
        own_pilot = tl.load(partials + size + offsets, mask=mask, other=0.0).to(tl.float64)
        total = tl.load(partials + 2 * size + offsets, mask=mask, other=0.0).to(tl.float64)
        squares = tl.load(partials + 3 * size + offsets, mask=mask, other=0.0).to(tl.float64)
        shift = total / n
        difference = tl.where(mask, own_pilot + shift - pilot[None, :], 0.0)
        weighted += n * difference
        squared += squares - total * shift + n * difference * difference
        start += ROWS
    weighted_sum = tl.sum(weighted, 0)
    shift = weighted_sum / count
    tl.store(mean + channel, pilot + shift, mask=exists)
    tl.store(m2 + channel, tl.sum(squared, 0) - weighted_sum * shift, mask=exists)


def tile_size(dtype: torch.dtype) -> int:
    """How many elements a program of `batch_stats` loads at once.

    Args:
        dtype: of the input.

    Returns:
        16 for each of 128 threads; 8 in float64, where more would not stay in registers.
    """
    return 1024 if dtype == torch.float64 else 2048


def row_tile(dtype: torch.dtype) -> dict[str, int]:
    """The tile of `row_stats_kernel`.

    Args:
        dtype: of the input.

    Returns:
        128 bytes of neighbouring channels, as many as one line of the cache, and rows to fill a tile.
    """
    columns = 128 // dtype.itemsize
    return {"ROWS": tile_size(dtype) // columns, "COLUMNS": columns}
