"""The mean of checkpoint files."""

from __future__ import annotations

from fastswa.checkpoints.average import CheckpointReport, average_checkpoints

__all__ = ["CheckpointReport", "average_checkpoints"]
