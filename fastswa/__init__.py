"""Weight averaging for PyTorch: torch.optim.swa_utils with the update fused."""

from __future__ import annotations

from fastswa.averaged_model import AveragedModel
from fastswa.batch_norm import BNUpdateReport, update_bn
from fastswa.rules import (
    EMA,
    SWA,
    get_ema_avg_fn,
    get_ema_multi_avg_fn,
    get_swa_avg_fn,
    get_swa_multi_avg_fn,
)
from fastswa.schedulers import SWALR

__version__ = "0.1.0"

__all__ = [
    "EMA",
    "SWA",
    "SWALR",
    "AveragedModel",
    "BNUpdateReport",
    "get_ema_avg_fn",
    "get_ema_multi_avg_fn",
    "get_swa_avg_fn",
    "get_swa_multi_avg_fn",
    "update_bn",
]
