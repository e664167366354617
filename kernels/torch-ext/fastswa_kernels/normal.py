r"""Normal numbers that are no stream but a function of a seed, a step and an element's number.

The same on every device and rank, after a resume, and in whatever pieces the elements are visited: two words of 32
random bits (`rounding.py`) for each element, and the transform of Box and Muller,

.. math::
    z = \sqrt{-2 \ln u}\, \cos(2 \pi v), \qquad u = (r \bmod 2^{31} + 1/2)\, 2^{-31}, \qquad v = a\, 2^{-32},

with :math:`r` and :math:`a` the words of numbers `RADIUS` and `ANGLE` where rounding would have an average's number; so
an update that rounds with the same seed and step has other bits. One of the pair that the transform gives is thrown
away: an element then needs nothing of its neighbour. The words are integers and the same everywhere; what follows is
float32, in which devices differ by the last bits of the logarithm and the sine.

The tail ends at :math:`\sqrt{64 \ln 2} = 6.66`, which a normal number passes once in 4e10.

References:
    Box and Muller 1958, A Note on the Generation of Random Normal Deviates.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .rounding import random_bits

RADIUS, ANGLE = 0xFFFFFFFF, 0xFFFFFFFE
"""Numbers of the two words, which no average has."""


def normal(first: int, count: int, seed: int, step: int, device: torch.device) -> Tensor:
    """Standard normal numbers of consecutive elements, the same whenever they are asked for.

    Args:
        first: number of the first element; 0 or more, below 2^63.
        count: of elements.
        seed: any integer, modulo 2^64.
        step: likewise; each has numbers of its own.
        device: of the result.

    Returns:
        float32, `count` elements, between -6.67 and 6.67. torch's own generators are neither read nor advanced.

    Example:
        >>> normal(0, 3, seed=1, step=7, device=torch.device("cpu"))
        tensor([-0.0569,  0.6618, -1.8656])
        >>> normal(1, 2, seed=1, step=7, device=torch.device("cpu"))
        tensor([ 0.6618, -1.8656])
    """
    # In place, as far as it goes: on a CPU every pass over memory counts.
    radius = random_bits(first, count, seed, step, RADIUS, device).bitwise_and_(0x7FFFFFFF).to(torch.float32)
    radius.add_(0.5).mul_(2.0**-31).log_().mul_(-2.0).sqrt_()
    # cos(2 pi v) = sin(2 pi (1/4 - |v|)): the subtraction is exact where the result is small, so zeros are not blurred.
    angle = random_bits(first, count, seed, step, ANGLE, device).to(torch.float32)
    angle.abs_().mul_(-(2.0**-32)).add_(0.25).mul_(2.0 * math.pi).sin_()
    return radius.mul_(angle)
