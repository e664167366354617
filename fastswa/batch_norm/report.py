"""What a recomputation of BatchNorm statistics did."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BNUpdateReport:
    """What `update_bn` did.

    Args:
        batches: that the statistics come from, of all processes.
        samples: in them; batches without a tensor count none.
        layers: names of the layers that were updated.
        never_called: names of the layers that no batch reached, which keep their statistics.
        worst_standard_error: over all channels, of the mean in standard deviations and of the variance in variances,
            estimated from how the batches differ; None where the batches' statistics were not kept apart
            (engine "eager") or where there was one batch.
        seconds: that it took.
    """

    batches: int
    samples: int
    layers: tuple[str, ...]
    never_called: tuple[str, ...]
    worst_standard_error: float | None
    seconds: float
