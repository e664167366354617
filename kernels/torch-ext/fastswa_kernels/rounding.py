r"""Stochastic rounding: an average in bfloat16 or float16 that moves by less than half a step still moves on average.

The random bits are no stream that is drawn from but a function of a seed, a step, an average's number and an element's
number. They are the same on every rank, after a resume, and in whatever pieces the elements are visited.

.. math::
    a = m(m(m(m(g \oplus seed_{lo}) \oplus seed_{hi}) \oplus step_{lo}) \oplus step_{hi}), \qquad
    bits = m(m(element_{lo} \oplus a) \oplus element_{hi} \oplus m(m(a) \oplus average))

with :math:`m` a mixing function of 32 bits. It costs few integer operations, so that memory remains the bound, and is
nothing for cryptography.

References:
    Wellons, Hash Prospector, https://github.com/skeeto/hash-prospector, issue 19: the mixing function
    "16 21f0aaad 15 d35a2d97 15", among the least biased ones known of two multiplications.
    Connolly, Higham and Mary 2021, Stochastic Rounding and Its Probabilistic Backward Error Analysis.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# An int32 tensor, or a Python integer in the range of int32: one arithmetic serves both.
_Words = Any

GOLDEN = 0x9E3779B9
"""Where the chain starts: mixing leaves 0 as it is, and seed 0 at step 0 needs a key too."""


@dataclass(frozen=True)
class StochasticRounding:
    """Which random bits one update of bfloat16 or float16 averages rounds with.

    Args:
        seed: of a run, equal on every rank; any integer, taken modulo 2^64.
        step: of the update, to be different for each: an integer modulo 2^64, or an int64 tensor of 0 dimensions on the
            averages' device, which is read there (so that a captured CUDA graph follows it).

    Raises:
        ValueError: a tensor of another shape or dtype.

    Example:
        >>> StochasticRounding(seed=1, step=1000)
        StochasticRounding(seed=1, step=1000)
    """

    seed: int
    step: int | Tensor

    def __post_init__(self) -> None:
        step = self.step
        if isinstance(step, Tensor) and (step.dim() or step.dtype != torch.int64):
            raise ValueError(
                f"step must be an int or a 0-dimensional int64 tensor, got {step.dtype} of shape {tuple(step.shape)}"
            )


def random_bits(first: int, count: int, seed: int, step: int | Tensor, average: int, device: torch.device) -> Tensor:
    """The random bits of consecutive elements, the same whenever they are asked for.

    Args:
        first: number of the first element; 0 or more, below 2^63.
        count: of elements.
        seed: any integer, modulo 2^64.
        step: an integer modulo 2^64, or an int64 tensor of 0 dimensions on `device`, not read on the host.
        average: number of the average among those that follow one source; modulo 2^32.
        device: of the result.

    Returns:
        int32, `count` elements, each of 32 random bits. torch's own generators are neither read nor advanced.

    Example:
        >>> random_bits(0, 3, seed=1, step=7, average=0, device=torch.device("cpu"))
        tensor([2001414365, -495319289, 1305772982], dtype=torch.int32)
        >>> random_bits(1, 2, seed=1, step=7, average=0, device=torch.device("cpu"))
        tensor([-495319289, 1305772982], dtype=torch.int32)
    """
    key = step_key(seed_key(seed), step)
    average_key = _mix(_mix(key) ^ _signed(average))
    bits = torch.empty(count, dtype=torch.int32, device=device)
    # In stretches whose high word is one number, in place: on a CPU every pass over memory counts.
    start = 0
    while start < count:
        high, low = divmod(first + start, 1 << 32)
        # A quarter of them at most, so that the count fits int32 too.
        stretch = bits[start : start + min(1 << 30, (1 << 32) - low)]
        torch.arange(len(stretch), out=stretch)
        stretch += _signed(low)
        stretch ^= key
        _mix_(stretch)
        stretch ^= average_key ^ _signed(high)
        _mix_(stretch)
        start += len(stretch)
    return bits


def round_stochastically(x: Tensor, dtype: torch.dtype, bits: Tensor) -> Tensor:
    r"""Round to one of the two neighbours, to the nearer one more often, so that the mean is exact.

    .. math:: P(\lceil x \rceil) = \frac{x - \lfloor x \rfloor}{\lceil x \rceil - \lfloor x \rfloor}

    Args:
        x: float32, any shape.
        dtype: bfloat16 or float16.
        bits: int32, of x's shape: 32 random bits for each element (`random_bits`).

    Returns:
        x in `dtype`. Numbers that `dtype` holds are unchanged, zeros keep their sign, NaN and infinities stay what they
        are. Above the largest finite number infinity counts as the next one: 65520 becomes 65504 or infinity in
        float16, each half of the time. The probability is exact, but for numbers below 2^-25 in float16, whose mean
        is exact to 2^-48.

    Raises:
        TypeError: another dtype.

    Example:
        >>> bits = random_bits(0, 1000, seed=1, step=7, average=0, device=torch.device("cpu"))
        >>> rounded = round_stochastically(torch.full((1000,), 1 + 2**-10), torch.bfloat16, bits)
        >>> rounded.unique()
        tensor([1.0000, 1.0078], dtype=torch.bfloat16)
        >>> abs(rounded.double().mean() - (1 + 2**-10)) < 1e-3
        tensor(True)
    """
    if x.dtype != torch.float32 or dtype not in (torch.bfloat16, torch.float16):
        raise TypeError(f"float32 is rounded to bfloat16 or float16, not {x.dtype} to {dtype}")
    dropped = 0xFFFF if dtype == torch.bfloat16 else 0x1FFF
    # Sign and magnitude: the sum moves away from zero, in fractions of the step between two numbers of the dtype.
    up = (bits & dropped).add_(x.view(torch.int32)).bitwise_and_(~dropped).view(torch.float32)
    # Only a finite number is no further than 0 from itself.
    rounded = torch.where(x - x == 0, up, x)
    if dtype == torch.float16:
        # Below 2^-14 the step of float16 is 2^-24 everywhere.
        units = x.abs() * 2.0**24
        whole = units.floor()
        whole += (bits >> 8 & 0xFFFFFF) * 2.0**-24 < units - whole
        rounded = torch.where(x.abs() < 2.0**-14, torch.copysign(whole * 2.0**-24, x), rounded)
    return rounded.to(dtype)


def seed_key(seed: int) -> int:
    """The seed's part of the key, a signed 32-bit integer.

    Args:
        seed: any integer, modulo 2^64.

    Returns:
        The key, to be mixed with the step's two words.

    Example:
        >>> seed_key(1) == seed_key(1 + 2**64)
        True
    """
    return int(_mix(_mix(_signed(GOLDEN ^ seed)) ^ _signed(seed >> 32)))


def step_key(key: int, step: int | Tensor) -> _Words:
    """The key of one step.

    Args:
        key: of the seed (`seed_key`).
        step: as `random_bits` takes it.

    Returns:
        A signed 32-bit integer, or an int32 tensor of 0 dimensions where the step is a tensor.

    Example:
        >>> step_key(seed_key(1), 7) == step_key(seed_key(1), torch.tensor(7))
        tensor(True)
    """
    if isinstance(step, Tensor):
        return _mix(_mix(step.to(torch.int32) ^ key) ^ (step >> 32).to(torch.int32))
    return _mix(_mix(key ^ _signed(step)) ^ _signed(step >> 32))


def _mix(x: _Words) -> _Words:
    # Shifts of int32 copy the sign bit: the masks make them shifts of unsigned words.
    x = x ^ (x >> 16 & 0xFFFF)
    x = _wrapped(x * _signed(0x21F0AAAD))
    x = x ^ (x >> 15 & 0x1FFFF)
    x = _wrapped(x * _signed(0xD35A2D97))
    return x ^ (x >> 15 & 0x1FFFF)


def _mix_(x: Tensor) -> None:
    """The same in place."""
    for shift, mask, factor in ((16, 0xFFFF, 0x21F0AAAD), (15, 0x1FFFF, 0xD35A2D97), (15, 0x1FFFF, None)):
        x ^= (x >> shift).bitwise_and_(mask)
        if factor is not None:
            x *= _signed(factor)


def _wrapped(x: _Words) -> _Words:
    return x if isinstance(x, Tensor) else _signed(x)


def _signed(word: int) -> int:
    """The low 32 bits of an integer as int32 holds them."""
    return (int(word) + (1 << 31)) % (1 << 32) - (1 << 31)
