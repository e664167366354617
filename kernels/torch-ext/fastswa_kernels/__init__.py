"""Fused Triton kernels for weight averaging.

The names below are the interface that other libraries call. Importing this package needs torch alone; triton is
imported when a kernel is first asked for. `fastswa_kernels.reference` states in plain torch what each kernel computes.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import reference
from .rounding import StochasticRounding
from .table import LaunchConfig, refusal

if TYPE_CHECKING:
    from .average import LerpTable, lerp_
    from .batch_norm import batch_stats, merge_batch_stats_
    from .combine import combine_
    from .moments import MomentsTable, moments_
    from .multi_average import MultiLerpTable, multi_lerp_
    from .sample import sample_

__version__ = "1.0.0"
"""Of the names below and their signatures, by Semantic Versioning; not of fastswa."""

__all__ = [
    "LaunchConfig",
    "LerpTable",
    "MomentsTable",
    "MultiLerpTable",
    "StochasticRounding",
    "batch_stats",
    "combine_",
    "lerp_",
    "merge_batch_stats_",
    "moments_",
    "multi_lerp_",
    "reference",
    "refusal",
    "sample_",
]

_MODULE_OF = {
    "LerpTable": ".average",
    "lerp_": ".average",
    "MultiLerpTable": ".multi_average",
    "multi_lerp_": ".multi_average",
    "batch_stats": ".batch_norm",
    "merge_batch_stats_": ".batch_norm",
    "combine_": ".combine",
    "MomentsTable": ".moments",
    "moments_": ".moments",
    "sample_": ".sample",
}


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(import_module(_MODULE_OF[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
