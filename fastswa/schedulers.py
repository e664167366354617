"""Learning-rate schedules for weight averaging."""

from __future__ import annotations

from torch.optim.swa_utils import SWALR

__all__ = ["SWALR"]
