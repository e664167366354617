"""The arithmetic of `rounding.py` for Triton's kernels, bit for bit the same.

Everything is done on integers: Triton's interpreter cuts float32 to bfloat16 off, and a GPU rounds it to the nearest.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _mix(x):
    x = x ^ (x >> 16)
    x = x * 0x21F0AAAD
    x = x ^ (x >> 15)
    x = x * 0xD35A2D97
    return x ^ (x >> 15)


@triton.jit
def step_key(key, step):
    """The key of one step: `key` is the seed's (uint32), `step` an int64 scalar."""
    return _mix(_mix(key ^ step.to(tl.uint32)) ^ (step >> 32).to(tl.uint32))


@triton.jit
def average_key(key, AVERAGE: tl.constexpr):
    """The key of one average at one step: `key` is the step's."""
    return _mix(_mix(key) ^ AVERAGE)


@triton.jit
def element_hash(element, key):
    """What the random bits of all averages of an element share: `element` is its number (int64), `key` the step's."""
    return _mix(element.to(tl.uint32) ^ key) ^ (element >> 32).to(tl.uint32)


@triton.jit
def element_bits(hashed, key):
    """32 random bits of an element: `hashed` is its hash, `key` the average's."""
    return _mix(hashed ^ key)


@triton.jit
def round_stochastically(x, hashed, key, DTYPE: tl.constexpr):
    """float32 rounded to one of its neighbours in DTYPE: `hashed` is the element's hash, `key` the average's."""
    bits = element_bits(hashed, key)
    word = x.to(tl.uint32, bitcast=True)
    if DTYPE == tl.bfloat16:  # noqa: SIM300
        up = tl.where(x != x, word | 0x400000, word + (bits & 0xFFFF))
        rounded = (up >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        up = tl.where(x != x, word, (word + (bits & 0x1FFF)) & 0xFFFFE000)
        # Below 2^-14 the step of float16 is 2^-24 everywhere.
        units = tl.abs(x) * 16777216.0
        whole = tl.floor(units)
        whole += tl.where((bits >> 8).to(tl.float32) * (1.0 / 16777216.0) < units - whole, 1.0, 0.0)
        small = (whole * (1.0 / 16777216.0)).to(tl.uint32, bitcast=True) | (word & 0x80000000)
        rounded = tl.where(units < 1024.0, small, up).to(tl.float32, bitcast=True).to(tl.float16)
    return rounded
