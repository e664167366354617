"""What BatchNorm statistics are taken of and merged into: the checks shared by the kernels and by the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from .pairs import FLOAT_DTYPES

ROWS = 6
"""Of a table of moments: weight, mean, its sum of squares, variance, its sum of squares, sum within batches."""


def check_channels(x: Tensor) -> None:
    """Refuse what is no input of a BatchNorm layer.

    Args:
        x: the tensor whose second dimension should be channels.

    Raises:
        ValueError: fewer than 2 or more than 5 dimensions.
        TypeError: a dtype that no statistics are taken of.
    """
    if not 2 <= x.dim() <= 5:
        raise ValueError(f"x must have 2 to 5 dimensions, the second for channels, got shape {tuple(x.shape)}")
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"x must be one of {', '.join(map(str, FLOAT_DTYPES))}, got {x.dtype}")


def check_merge(
    moments: Tensor,
    batch_mean: Tensor,
    batch_var: Tensor,
    weights: Tensor,
    counts: Tensor,
    layer_of_channel: Tensor,
    nonfinite: Tensor,
) -> None:
    """Refuse arguments of `merge_batch_stats_` that do not belong together.

    Args:
        moments: float64, 6 x channels, contiguous.
        batch_mean: floating, one for each channel.
        batch_var: of the dtype and shape of `batch_mean`.
        weights: float64, one for each layer.
        counts: float64, one for each layer.
        layer_of_channel: int32, one for each channel; its values are not read.
        nonfinite: int32, one for each layer.

    Raises:
        ValueError: a shape, stride or device that does not fit; names the argument.
        TypeError: a dtype that does not fit; names the argument.
    """
    channels, layers = layer_of_channel.shape[:1], weights.shape[:1]
    wanted = {
        "moments": (moments, (ROWS, *channels), (torch.float64,)),
        "batch_mean": (batch_mean, channels, FLOAT_DTYPES),
        "batch_var": (batch_var, channels, (batch_mean.dtype,)),
        "weights": (weights, layers, (torch.float64,)),
        "counts": (counts, layers, (torch.float64,)),
        "layer_of_channel": (layer_of_channel, channels, (torch.int32,)),
        "nonfinite": (nonfinite, layers, (torch.int32,)),
    }
    for name, (tensor, shape, dtypes) in wanted.items():
        if tensor.dtype not in dtypes:
            raise TypeError(f"{name} must be {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
        if tensor.shape != torch.Size(shape):
            raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous")
        if tensor.device != moments.device:
            raise ValueError(f"{name} is on {tensor.device} and moments on {moments.device}")
