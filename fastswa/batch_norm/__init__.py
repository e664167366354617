"""Recompute BatchNorm statistics for averaged weights."""

from __future__ import annotations

from fastswa.batch_norm.report import BNUpdateReport
from fastswa.batch_norm.update import update_bn

__all__ = ["BNUpdateReport", "update_bn"]
