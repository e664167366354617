"""Weight averaging for PyTorch: torch.optim.swa_utils with the update fused."""

from __future__ import annotations

from fastswa.acceleration import Acceleration, accelerate_torch, restore_torch
from fastswa.averaged_model import AveragedModel
from fastswa.averaging_functions import (
    get_ema_avg_fn,
    get_ema_multi_avg_fn,
    get_swa_avg_fn,
    get_swa_multi_avg_fn,
)
from fastswa.batch_norm import BNUpdateReport, update_bn
from fastswa.checkpoints import CheckpointReport, average_checkpoints
from fastswa.ensemble import average_predictions
from fastswa.lawa import LAWA
from fastswa.power_ema import PowerEMA
from fastswa.ranks import average_across_ranks_
from fastswa.rules import EMA, SWA
from fastswa.schedulers import SWALR, CyclicalSWALR
from fastswa.swag import SWAG
from fastswa.synthesis import Snapshot, synthesize
from fastswa.warmups import AnnealingWarmup, ExponentialWarmup, HalfLifeWarmup, InversePowerWarmup, RatioWarmup
from fastswa.weight_averages import WeightAverages

__version__ = "0.1.0"

__all__ = [
    "EMA",
    "LAWA",
    "SWA",
    "SWAG",
    "SWALR",
    "Acceleration",
    "AnnealingWarmup",
    "AveragedModel",
    "BNUpdateReport",
    "CheckpointReport",
    "CyclicalSWALR",
    "ExponentialWarmup",
    "HalfLifeWarmup",
    "InversePowerWarmup",
    "PowerEMA",
    "RatioWarmup",
    "Snapshot",
    "WeightAverages",
    "accelerate_torch",
    "average_across_ranks_",
    "average_checkpoints",
    "average_predictions",
    "get_ema_avg_fn",
    "get_ema_multi_avg_fn",
    "get_swa_avg_fn",
    "get_swa_multi_avg_fn",
    "restore_torch",
    "synthesize",
    "update_bn",
]
