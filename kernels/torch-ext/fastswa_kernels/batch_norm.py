"""The statistics that BatchNorm recomputation needs: of a layer's input, and of all layers merged batch by batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import batch_norm_kernel as kernels
from .channels import check_channels, check_merge
from .table import refusal

PROGRAMS = 1024
"""Programs that are worth starting before one takes more than a tile; the same everywhere, so that results are too."""


@torch.no_grad()
def merge_batch_stats_(
    moments: Tensor,
    batch_mean: Tensor,
    batch_var: Tensor,
    weights: Tensor,
    counts: Tensor,
    layer_of_channel: Tensor,
    nonfinite: Tensor,
) -> None:
    r"""Merge one batch's BatchNorm statistics into running moments, in one launch for the channels of all layers.

    .. math::
        W \leftarrow W + w, \qquad
        \mu \leftarrow \mu + \tfrac{w}{W} (m - \mu), \qquad
        S_\mu \leftarrow S_\mu + w (m - \mu_{old})(m - \mu_{new})

    and the same for the variance; `fastswa_kernels.reference.merge_batch_stats_` is the specification. Arithmetic is
    float64. Nothing is read on the host, so a CUDA graph may hold the call.

    Args:
        moments: float64, 6 x channels, written; rows `W`, `mu`, `S_mu`, `v`, `S_v`, `within`, zero before the first
            batch.
        batch_mean: one for each channel, the batch's mean; float32, bfloat16, float16 or float64.
        batch_var: one for each channel, the batch's unbiased variance; of the dtype of `batch_mean`.
        weights: float64, one for each layer, `w`; the channels of a layer of weight 0 are neither read nor written.
        counts: float64, one for each layer: how many values a channel had in the batch.
        layer_of_channel: int32, one for each channel: its index in `weights`, which is not checked.
        nonfinite: int32, one for each layer, written: becomes 1 where a statistic of a layer that is not left out is
            NaN or infinite; never becomes 0 again.

    Raises:
        ValueError: a shape that does not fit, or a device that can't run the kernel; nothing has been written.
        TypeError: a dtype that does not fit; nothing has been written.

    Example:
        >>> moments = torch.zeros(6, 2, dtype=torch.float64, device="cuda")
        >>> one = torch.ones(1, dtype=torch.float64, device="cuda")
        >>> layer, nonfinite = torch.zeros(3, dtype=torch.int32, device="cuda").split([2, 1])
        >>> for value in (1.0, 3.0):
        ...     mean, var = torch.full((2,), value, device="cuda"), torch.ones(2, device="cuda")
        ...     merge_batch_stats_(moments, mean, var, one, 8 * one, layer, nonfinite)
        >>> moments[:, 0].tolist()
        [2.0, 2.0, 2.0, 1.0, 0.0, 14.0]

    References:
        Chan, Golub and LeVeque 1983, Algorithms for Computing the Sample Variance, equation 2.1 with weights.
    """
    check_merge(moments, batch_mean, batch_var, weights, counts, layer_of_channel, nonfinite)
    reason = refusal(moments.device)
    if reason:
        raise ValueError(f"moments: {reason}")
    channels = moments.shape[1]
    with torch.cuda.device(moments.device if moments.is_cuda else -1):
        kernels.merge_batch_stats_kernel[(_divide_up(channels, kernels.MERGE_BLOCK),)](
            *(moments, batch_mean, batch_var, weights, counts, layer_of_channel, nonfinite, channels),
            BLOCK=kernels.MERGE_BLOCK,
            num_warps=kernels.NUM_WARPS,
        )


@torch.no_grad()
def batch_stats(x: Tensor) -> tuple[int, Tensor, Tensor]:
    r"""The statistics of each channel of a BatchNorm layer's input, in two launches.

    .. math:: \mu_c = \frac{1}{n} \sum_i x_{ci}, \qquad M_c = \sum_i (x_{ci} - \mu_c)^2

    `fastswa_kernels.reference.batch_stats` is the specification. A program sums differences from a value near the mean
    in float32 (float64 for float64 input), and programs are merged in float64. Wherever the mean is, the variance is
    right to better than 1e-6; where a first 64th of a program's values is unlike all its others, to 64 times that.
    Squares of differences below 1e-18 or above 1e16 leave the range of float32. Nothing is read on the host, so a CUDA
    graph may hold the call.

    Args:
        x: 2 to 5 dimensions, of which the second is the channels'; float32, bfloat16, float16 or float64. Contiguous
            or channels last; another layout is first copied.

    Returns:
        How many values a channel has (n), their mean, and their sum of squares about it, both float64. Without values
        (n = 0) both are zero.

    Raises:
        ValueError: fewer than 2 or more than 5 dimensions, or a device that can't run the kernels.
        TypeError: a dtype that is not one of the four.

    Example:
        >>> count, mean, m2 = batch_stats(torch.tensor([[1.0, 5.0], [3.0, 5.0]], device="cuda"))
        >>> count, mean.tolist(), m2.tolist()
        (2, [2.0, 5.0], [2.0, 0.0])

    References:
        Chan, Golub and LeVeque 1983, Algorithms for Computing the Sample Variance: shifted data, pairwise merge.
    """
    check_channels(x)
    reason = refusal(x.device)
    if reason:
        raise ValueError(f"x: {reason}")
    channels = x.shape[1]
    count = x.numel() // channels if x.numel() else 0
    make = torch.empty if count else torch.zeros
    mean, m2 = (make(channels, dtype=torch.float64, device=x.device) for _ in range(2))
    if not count:
        return count, mean, m2

    x = x.resolve_neg()
    if not (x.is_contiguous() or x.movedim(1, -1).is_contiguous()):
        x = x.contiguous()
    plane = count // x.shape[0]
    with torch.cuda.device(x.device if x.is_cuda else -1):
        # The kernel counts places in a plane in 32 bits.
        if x.is_contiguous() and 1 < plane < 1 << 31:
            partials = _plane_partials(x, plane)
        else:
            partials = _row_partials(x.movedim(1, -1).reshape(-1, channels))
        tile = kernels.PARTIALS
        kernels.merge_partials_kernel[(_divide_up(channels, tile["CHANNELS"]),)](
            *(partials, mean, m2, partials[0].numel() // channels, channels, count),
            **tile,
            num_warps=kernels.PARTIALS_NUM_WARPS,
        )
    return count, mean, m2


def _plane_partials(x: Tensor, plane: int) -> Tensor:
    vector = _vector(x, plane)
    channels, groups, block = x.shape[1], x.numel() // x.shape[1] // vector, kernels.tile_size(x.dtype) // vector
    splits, program_groups = _split(groups, block, channels)
    partials = _empty_partials(x, splits * channels)
    kernels.plane_stats_kernel[(splits * channels,)](
        *(x, partials, channels, plane // vector, groups, program_groups),
        VECTOR=vector,
        BLOCK=block,
        num_warps=kernels.NUM_WARPS,
    )
    return partials


def _row_partials(x: Tensor) -> Tensor:
    tile = kernels.row_tile(x.dtype)
    if x.shape[1] < tile["COLUMNS"]:
        # Few channels would leave lanes idle. Several rows side by side only give several partial sums of a channel.
        wanted = tile["COLUMNS"] // math.gcd(tile["COLUMNS"], x.shape[1])
        x = x.view(-1, math.gcd(wanted, x.shape[0]) * x.shape[1])
    rows, columns = x.shape
    blocks = _divide_up(columns, tile["COLUMNS"])
    splits, program_rows = _split(rows, tile["ROWS"], blocks)
    partials = _empty_partials(x, splits * columns)
    kernels.row_stats_kernel[(splits * blocks,)](
        *(x, partials, rows, columns, program_rows),
        VECTOR=_vector(x, columns),
        **tile,
        num_warps=kernels.NUM_WARPS,
    )
    return partials


def _empty_partials(x: Tensor, size: int) -> Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.empty(4, size, dtype=dtype, device=x.device)


def _vector(x: Tensor, length: int) -> int:
    """The most elements, up to 16 bytes, that can be loaded at once everywhere in stretches of a length."""
    # Triton knows an address to be divisible by 16, or nothing of it.
    return math.gcd(length, 16 // x.element_size()) if x.data_ptr() % 16 == 0 else 1


def _split(length: int, tile: int, lanes: int) -> tuple[int, int]:
    """Into how many programs a channel's values are split, and the part of each but the last: equal whole tiles."""
    tiles = _divide_up(length, tile)
    splits = _divide_up(tiles, min(kernels.MAX_TILES, max(1, tiles * lanes // PROGRAMS)))
    return splits, _divide_up(tiles, splits) * tile


def _divide_up(length: int, part: int) -> int:
    return -(-length // part)
