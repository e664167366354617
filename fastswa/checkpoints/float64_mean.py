"""A weighted mean in float64, rounded once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def float64_mean(terms: Sequence[Tensor], weights: Sequence[float], dtype: torch.dtype) -> Tensor:
    r"""The weighted mean of tensors, in float64 and in the order given, rounded once.

    .. math:: \bar t = \mathrm{round}\Big( \sum_k w_k t_k \Big/ \sum_k w_k \Big)

    Args:
        terms: real floating tensors of one shape and any dtypes, one at least.
        weights: of the terms; their sum is not 0.
        dtype: of the result: float64, float32, float16 or bfloat16.

    Returns:
        A new tensor.

    Example:
        >>> float64_mean([torch.tensor([1.0]), torch.tensor([3.0])], [3.0, 1.0], torch.float16)
        tensor([1.5000], dtype=torch.float16)
    """
    total: Tensor | None = None
    for term, weight in zip(terms, weights, strict=True):
        # Product and sum are rounded apart: a fused multiply-add is at hand in some of torch's loops only, and the
        # result would depend on which loop an element fell into.
        wide = term.to(torch.float64, copy=True)
        if weight != 1:
            wide.mul_(weight)
        total = wide if total is None else total.add_(wide)
    assert total is not None
    return round_once(total.div_(math.fsum(weights)), dtype)


def round_once(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers of a dtype that are nearest to float64 values, ties to even.

    torch goes from float64 to the 16-bit dtypes through float32 and so rounds twice: 1 + 2^-11 + 2^-40 becomes the
    float16 number 1, though the next one is nearer. Here the step to float32 is rounded to odd, which keeps what the
    last rounding must know: on which side of a tie the value lies.

    Args:
        values: float64.
        dtype: float64, float32, float16 or bfloat16.

    Returns:
        A tensor of `dtype`.

    Example:
        >>> round_once(torch.tensor([1 + 2**-11 + 2**-40], dtype=torch.float64), torch.float16).item() == 1 + 2**-10
        True

    References:
        Boldo and Melquiond 2008, Emulation of a FMA and correctly rounded sums: proved algorithms using rounding to
        odd, theorem 2.
    """
    if dtype.itemsize > 2:
        return values.to(dtype)
    single = values.to(torch.float32)
    back = single.to(torch.float64)
    bits = single.view(torch.int32)
    # A neighbour in magnitude is one away in the bits, whatever the sign; NaN stays NaN.
    inward = back.abs() > values.abs()
    even = (bits & 1) == 0
    bits += ((back != values) & even) * (1 - 2 * inward.to(torch.int32))
    return single.to(dtype)
