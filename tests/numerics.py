"""How exact a result must be, in units in the last place (ulp), and why.

One lerp rounds three times in the arithmetic's dtype, each time by at most half an ulp: the difference (up to twice an
operand, but scaled by a weight of at most 1/2 in the two-sided form), the product (an operand at most), the sum. A
fused multiply-add saves one. The unit is the ulp of the largest operand, whatever the result's own size: where average
and source cancel, no arithmetic of the same width does better. 1.5 ulp from the exact value is 1 ulp from the
correctly rounded one. The weight counts as given in the arithmetic's dtype.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

LERP_ULPS = {
    torch.float32: 1.5,
    torch.float64: 1.5,
    # float32 arithmetic errs by 1.5 * 2^-13 (float16) or 2^-16 (bfloat16) of these ulps; then the store rounds once.
    torch.float16: 0.51,
    torch.bfloat16: 0.51,
}


def lerp_ulps(dtype: torch.dtype, kernel: bool = False) -> float:
    """The bound for one lerp into an average of this dtype."""
    if kernel and dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1":
        # The interpreter truncates at this store, an error of up to a whole ulp. A GPU rounds: its bound stays.
        return 1.01
    return LERP_ULPS[dtype]


# A rounding errs by 2^-24 of a number of float32 at most, and an ulp is no less: the bounds of what is never the
# difference of two near numbers count roundings. A deviation has 3 (the distance, 1 - w, their product); a variance 7
# (the distance, which is squared, twice; w d; w d d; the sum; 1 - w; the product). The last half is the exact value's
# own rounding to float64. Narrow dtypes are rounded once at the store, as in LERP_ULPS.
DEVIATION_ULPS, VARIANCE_ULPS = 3.5, 7.5


def moments_ulps(dtype: torch.dtype, wider: bool, kernel: bool = False) -> tuple[float, float, float]:
    """The bounds for mean, variance and deviation of this dtype after one model; `wider`: the arithmetic is."""
    if wider:
        stored = lerp_ulps(torch.bfloat16 if dtype == torch.bfloat16 else torch.float16, kernel)
        return stored, stored, stored
    return LERP_ULPS[dtype] + 0.5, VARIANCE_ULPS, DEVIATION_ULPS


# Two ways to make a normal number of the same random words differ by this part of it. Each errs, in units of 2^-23: the
# logarithm by 1, halved by the root, the root by 1 on a GPU, the sine by 2, the product by 1/2; together 4, twice.
NORMAL_ERROR = 8 * 2**-23


# A float64 sum rounded once: by half an ulp. The half-precision dtypes are reached through float32, whose own half ulp
# is 2^-14 (float16) or 2^-17 (bfloat16) of theirs.
SUM_ULPS = {torch.float32: 0.5, torch.float64: 0.5, torch.float16: 0.5 + 2**-14, torch.bfloat16: 0.5 + 2**-17}


def assert_weighted_sum(actual: Tensor, exact: Tensor, size: Tensor, terms: int, kernel: bool = False) -> None:
    """Compare a sum of products with a float64 result.

    Args:
        actual: the sum.
        exact: what it is to be, rounded to float64 or summed there in some order.
        size: the sum of the absolute products: each of 2 N roundings errs by 2^-53 of it at most, in either sum.
        terms: N.
        kernel: whether a kernel made the sum.
    """
    assert actual.shape == exact.shape
    truncated = kernel and actual.dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1"
    ulps = 1.0 if truncated else SUM_ULPS[actual.dtype]
    bound = ulps * ulp(exact.abs(), actual.dtype) + 2 * terms * 2**-52 * size.double()
    error = (actual.double() - exact.double()).abs()
    assert not error.isnan().any(), "NaN in the result"
    assert (error <= bound).all(), f"{(error / bound).max().item():.3g} times the bound"


def ulp(magnitude: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between neighbouring numbers of a dtype at a magnitude, in float64."""
    information = torch.finfo(dtype)
    exponent = torch.frexp(magnitude.double().clamp_min(information.smallest_normal)).exponent - 1
    return torch.ldexp(torch.full_like(magnitude, information.eps, dtype=torch.float64), exponent)


def assert_close_in_ulps(actual: Tensor, exact: Tensor, ulps: float, *operands: Tensor) -> None:
    """Compare with a float64 result, in ulps of the largest operand."""
    assert actual.shape == exact.shape
    if not actual.numel():
        return
    scale = exact.double().abs()
    for operand in operands:
        scale = torch.maximum(scale, operand.double().abs())
    error = (actual.double() - exact.double()).abs() / ulp(scale, actual.dtype)
    assert not error.isnan().any(), "NaN in the result"
    assert error.max() <= ulps, f"{error.max().item():.3g} ulp at index {error.argmax().item()}, allowed {ulps}"
