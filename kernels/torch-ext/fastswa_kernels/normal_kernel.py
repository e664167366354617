"""The arithmetic of `normal.py` for Triton's kernels: the same random words, the same numbers to their last bits."""

from __future__ import annotations

import triton
import triton.language as tl

from .normal import ANGLE, RADIUS
from .rounding_kernel import average_key, element_bits, element_hash

_RADIUS = tl.constexpr(RADIUS)
_ANGLE = tl.constexpr(ANGLE)


@triton.jit
def _quarter_sine(x):
    # Triton's own reduces an angle of any size, by a table in local memory. Here |x| is at most pi / 2, where this
    # polynomial (least relative error, 6e-9) errs by less than 2 units in the last place of float32.
    square = x * x
    series = 2.6058098e-06 * square - 1.9809616e-04
    series = series * square + 8.3330664e-03
    series = series * square - 1.6666660e-01
    return x + x * (square * series)


@triton.jit
def normal(element, key):
    """Standard normal numbers (float32): `element` are the elements' numbers (int64), `key` is the step's (uint32)."""
    hashed = element_hash(element, key)
    word = element_bits(hashed, average_key(key, _RADIUS)) & 0x7FFFFFFF
    radius = tl.sqrt(-2.0 * tl.log((word.to(tl.float32) + 0.5) * (1.0 / 2147483648.0)))
    # Read as signed: the angle's magnitude is at most half a turn.
    turn = tl.abs(element_bits(hashed, average_key(key, _ANGLE)).to(tl.int32, bitcast=True).to(tl.float32))
    return radius * _quarter_sine((0.25 - turn * (1.0 / 4294967296.0)) * 6.283185307179586)
