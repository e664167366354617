"""What is timed against what: one small function for each way to recompute BatchNorm statistics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import swa_utils

import fastswa
from benchmarks.batch_norm.cases import Workload

Pass = Callable[[nn.Module, Sequence[Tensor], torch.device | None], object]
"""Runs a model over batches, which it moves to a device, or leaves where they are if that is None."""


@dataclass(frozen=True)
class Provider:
    """A way to recompute BatchNorm statistics.

    Args:
        over: runs a pass.
        pooled: whether it gives the statistics of all values together; otherwise the means of the batches' means and
            unbiased variances, as torch does.
        ours: whether its result is fastswa's responsibility.
        same_bits: whether it promises torch's result to the last bit on a CPU.
        squares: whether its variance is a difference of squares in float32, which cancel.
    """

    over: Pass
    pooled: bool = False
    ours: bool = False
    same_bits: bool = False
    squares: bool = False

    def run(self, workload: Workload, batches: Sequence[Tensor] | None = None) -> None:
        """Run a pass.

        Args:
            workload: whose model is updated.
            batches: others than the workload's.
        """
        with workload.computing():
            self.over(
                workload.model,
                workload.batches if batches is None else batches,
                workload.device if workload.moves else None,
            )


def _torch(model: nn.Module, batches: Sequence[Tensor], device: torch.device | None) -> None:
    swa_utils.update_bn(batches, model, device)


def _fvcore(model: nn.Module, batches: Sequence[Tensor], device: torch.device | None) -> None:
    from fvcore.nn.precise_bn import update_bn_stats

    # It leaves modes and devices to its caller.
    model.train()
    update_bn_stats(model, batches if device is None else (batch.to(device) for batch in batches), len(batches))
    model.eval()


def _fastswa(model: nn.Module, batches: Sequence[Tensor], device: torch.device | None, **options: str) -> None:
    fastswa.update_bn(batches, model, device, **options)  # type: ignore[arg-type]


OURS = "fastswa update_bn"
TORCH = "torch update_bn"
FVCORE = "fvcore update_bn_stats"
MERGE = f"{OURS}, engine=merge"
POPULATION = f"{OURS}, estimator=population"

PROVIDERS: dict[str, Provider] = {
    OURS: Provider(_fastswa, ours=True, same_bits=True),
    MERGE: Provider(partial(_fastswa, engine="merge"), ours=True),
    POPULATION: Provider(partial(_fastswa, estimator="population"), pooled=True, ours=True),
    TORCH: Provider(_torch),
    FVCORE: Provider(_fvcore, pooled=True, squares=True),
}
"""By the names in the results. The default of fastswa is its eager engine."""
