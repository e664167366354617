"""Whether the host waits for a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

LONG = 200_000_000
"""Cycles of a GPU, about 0.1 s: far longer than the host needs to go on."""


@contextmanager
def host_not_blocked() -> Iterator[None]:
    """Inside, a call that waits for the GPU raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
