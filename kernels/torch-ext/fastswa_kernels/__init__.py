"""Fused Triton kernels for weight averaging.

The names below are the interface that other libraries call. Importing this package needs torch alone; triton is
imported when a kernel is first asked for. `fastswa_kernels.reference` states in plain torch what each kernel computes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import reference
from .table import LaunchConfig, refusal

if TYPE_CHECKING:
    from .average import LerpTable, lerp_

__all__ = ["LaunchConfig", "LerpTable", "lerp_", "reference", "refusal"]


def __getattr__(name: str) -> Any:
    if name in ("LerpTable", "lerp_"):
        from . import average

        return getattr(average, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
