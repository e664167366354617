"""When to stop a pass: the statistics are sure enough, or spoilt. Read without making the host wait for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from fastswa.batch_norm.moments import Moments

EVERY = 8
"""Batches from one look to the next."""


class Confidence:
    """Looks at the moments now and then, one batch late on a GPU.

    Args:
        moments: that are being merged.
        rtol: the standard error at which every channel is sure enough; None to go on to the end.
        min_batches: before which the errors' own estimates are not trusted.
        check_finite: whether a NaN or an infinity ends the pass too.
    """

    def __init__(self, moments: Moments, rtol: float | None, min_batches: int, check_finite: bool) -> None:
        self._moments = moments
        self._rtol = rtol
        self._min_batches = min_batches
        self._check_finite = check_finite
        self._asked: tuple[Tensor, torch.cuda.Event | None] | None = None
        self.spoilt = False
        """Whether the pass ended because a statistic was NaN or infinite."""

    def enough(self, batches: int) -> bool:
        """Whether the pass may stop.

        Args:
            batches: that were merged.
        """
        if self._asked is not None:
            values, copied = self._asked
            if copied is None or copied.query():  # type: ignore[no-untyped-call]
                self._asked = None
                worst, spoilt = values.tolist()
                self.spoilt = self._check_finite and bool(spoilt)
                return self.spoilt or (self._rtol is not None and worst <= self._rtol)
        elif batches >= self._min_batches and (batches - self._min_batches) % EVERY == 0:
            self._ask(batches)
            # Without a device to wait for, the answer is there.
            return self._asked is not None and self._asked[1] is None and self.enough(batches)
        return False

    def spoilt_layers(self) -> list[int]:
        """The layers whose statistics were NaN or infinite. Waits for the device."""
        return self._moments.nonfinite()

    def _ask(self, batches: int) -> None:
        values = self._moments.progress(batches)
        if not values.is_cuda:
            self._asked = values, None
            return
        host = torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record(torch.cuda.current_stream(values.device))
        self._asked = host, copied
