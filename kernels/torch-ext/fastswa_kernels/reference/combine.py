"""What a weighted sum of lists of tensors computes, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..combine_arguments import check_combine


@torch.no_grad()
def combine_(
    targets: Sequence[Tensor], sources: Sequence[Sequence[Tensor]], coefficients: Sequence[float] | Tensor
) -> None:
    r"""Make each target a weighted sum of its sources.

    .. math:: t_i \leftarrow \sum_{k:\, c_k \ne 0} c_k\, p_{ki}

    Arithmetic is float64, because terms may cancel, and the result is rounded once, to the target's dtype: to the
    nearest number of that dtype, but for an error of the sum of at most :math:`N 2^{-52} \sum_k |c_k p_{ki}|`. bfloat16
    and float16 are reached through float32, which costs 2^-17 and 2^-14 of their last place beside the half of any
    rounding. A sum that is 1 times one source is that source, bit for bit.

    Args:
        targets: tensors of float32, bfloat16, float16 or float64; any shape and strides; written. A target may be one
            of its own sources (the same memory in the same layout).
        sources: N lists; sources[k][i] is of the shape of targets[i]; any of those dtypes, strides and devices; read.
            The N sources of one target share a dtype and device.
        coefficients: N finite floats, or a floating tensor of shape (N,), best of float64. A source of coefficient 0 is
            not read, so NaN there does not matter; where all are 0, targets become 0.

    Raises:
        ValueError: no list of sources, lists of different length, shapes that differ, sources of one target of
            different dtype or device, memory that overlaps otherwise, coefficients of another number or not finite;
            nothing has been written.
        TypeError: a dtype that is not one of the four, coefficients of another type; nothing has been written.

    Example:
        >>> first, second = [torch.tensor([1.0, 2.0])], [torch.tensor([3.0, 6.0])]
        >>> target = [torch.empty(2)]
        >>> combine_(target, [first, second], [0.75, 0.25])
        >>> target
        [tensor([1.5000, 3.0000])]
        >>> combine_(first, [first, second], [-1.0, 1.0])  # in place
        >>> first
        [tensor([2., 4.])]

    References:
        Wortsman et al. 2022, Model soups: averaging weights of multiple fine-tuned models improves accuracy without
        increasing inference time, section 2.
    """
    indices = check_combine(targets, sources, coefficients)
    values = coefficients.tolist() if isinstance(coefficients, Tensor) else coefficients
    for index in indices:
        target, terms = targets[index], []
        for tensors, value in zip(sources, values, strict=True):
            if value != 0:
                terms.append(float(value) * tensors[index].to(target.device, torch.float64))
        # From the first term on: 0 + -0 would be 0.
        target.copy_(sum(terms[1:], start=terms[0]) if terms else torch.zeros_like(target))
