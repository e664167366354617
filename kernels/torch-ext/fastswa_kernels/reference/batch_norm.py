"""What the kernels for BatchNorm statistics compute, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..channels import check_channels, check_merge


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
    r"""Merge one batch's BatchNorm statistics into running moments, for the channels of many layers at once.

    .. math::
        W \leftarrow W + w, \qquad
        \mu \leftarrow \mu + \tfrac{w}{W} (m - \mu), \qquad
        S_\mu \leftarrow S_\mu + w (m - \mu_{old})(m - \mu_{new})

    and the same for the variance, :math:`S_v`; the sum within batches grows by :math:`(n - 1) v`. Then :math:`\mu` and
    :math:`v` are weighted means over the batches, :math:`S_\mu / W` is the variance of the batch means, and with
    :math:`w = n` the variance of all values together is :math:`(within + S_\mu) / W`.

    Args:
        moments: float64, 6 x channels, written; rows `W`, `mu`, `S_mu`, `v`, `S_v`, `within`, zero before the first
            batch.
        batch_mean: the batch's mean of each channel, `m`; any floating dtype.
        batch_var: the batch's unbiased variance of each channel, `v`; any floating dtype.
        weights: float64, one for each layer, `w`; 0 leaves a layer out, whatever its statistics hold.
        counts: float64, one for each layer: how many values a channel had in the batch, `n`.
        layer_of_channel: int32, one for each channel: its index in `weights`.
        nonfinite: int32, one for each layer, written: becomes 1 where a statistic of a layer that is not left out is
            NaN or infinite; never becomes 0 again.

    Raises:
        ValueError: a shape that does not fit; nothing has been written.
        TypeError: a dtype that does not fit; nothing has been written.

    Example:
        >>> moments, nonfinite = torch.zeros(6, 2, dtype=torch.float64), torch.zeros(1, dtype=torch.int32)
        >>> one, layer = torch.ones(1, dtype=torch.float64), torch.zeros(2, dtype=torch.int32)
        >>> for mean in (1.0, 3.0):
        ...     mean, var = torch.full((2,), mean), torch.ones(2)
        ...     merge_batch_stats_(moments, mean, var, one, 8 * one, layer, nonfinite)
        >>> moments[:, 0].tolist()
        [2.0, 2.0, 2.0, 1.0, 0.0, 14.0]

    References:
        Chan, Golub and LeVeque 1983, Algorithms for Computing the Sample Variance, equation 2.1 with weights.
    """
    check_merge(moments, batch_mean, batch_var, weights, counts, layer_of_channel, nonfinite)
    weight, count = weights[layer_of_channel], counts[layer_of_channel]
    reached = weight > 0
    means, squares = moments[1:5:2], moments[2:5:2]
    # A layer that is left out may hold anything.
    batch = torch.where(reached, torch.stack([batch_mean, batch_var]).double(), means)
    bad = reached & ~batch.isfinite().all(0)
    nonfinite.scatter_reduce_(0, layer_of_channel.long(), bad.int(), "amax")
    moments[0] += weight
    difference = batch - means
    means += torch.where(reached, weight / moments[0], 0) * difference
    squares += weight * difference * (batch - means)
    moments[5] += torch.where(reached, (count - 1) * batch[1], 0)


@torch.no_grad()
def batch_stats(x: Tensor) -> tuple[int, Tensor, Tensor]:
    r"""The statistics of each channel of a BatchNorm layer's input.

    .. math:: \mu_c = \frac{1}{n} \sum_i x_{ci}, \qquad M_c = \sum_i (x_{ci} - \mu_c)^2

    Args:
        x: 2 to 5 dimensions, of which the second is the channels'; float32, bfloat16, float16 or float64; any strides.

    Returns:
        How many values a channel has (n), their mean, and their sum of squares about it, both float64. Without values
        (n = 0) both are zero.

    Raises:
        ValueError: fewer than 2 or more than 5 dimensions.
        TypeError: a dtype that is not one of the four.

    Example:
        >>> batch_stats(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))
        (2, tensor([2., 5.], dtype=torch.float64), tensor([2., 0.], dtype=torch.float64))
    """
    check_channels(x)
    count = x.numel() // x.shape[1] if x.numel() else 0
    if not count:
        zero = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
        return 0, zero, zero.clone()
    var, mean = torch.var_mean(x.double(), [dim for dim in range(x.dim()) if dim != 1], correction=0)
    return count, mean, var * count
