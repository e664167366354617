"""The specification: what every kernel computes, in plain torch, with the same signatures.

Run on float64 copies, these are the numbers that the kernels are tested against. They allocate temporaries and loop
over tensors in Python; they are for reading and for checking, not for speed.
"""

from __future__ import annotations

from .average import lerp_, multi_lerp_
from .batch_norm import batch_stats, merge_batch_stats_
from .combine import combine_
from .moments import moments_, sample_

__all__ = ["batch_stats", "combine_", "lerp_", "merge_batch_stats_", "moments_", "multi_lerp_", "sample_"]
