"""Statistics of several processes, put together by one all-reduce."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, distributed

from fastswa.batch_norm.moments import Moments


@dataclass
class Seen:
    """How much data a pass saw.

    Args:
        batches: that were run.
        samples: in them.
        calls: of each layer.
    """

    batches: int
    samples: int
    calls: Sequence[int]


def add_up(group: distributed.ProcessGroup, moments: Moments, seen: Seen) -> Seen:
    """Add up moments and counts over the processes of a group, in one float64 all-reduce.

    Args:
        group: of processes that all call this.
        moments: of this process; becomes those of all.
        seen: by this process.

    Returns:
        What all processes saw together.

    Raises:
        RuntimeError: another process failed before it came here.
    """
    sums = moments.sums()
    header = _header(sums, failed=0, seen=seen)
    together = torch.cat([header, sums])
    distributed.all_reduce(together, group=group)
    failed, batches, samples, *calls = together[: len(header)].long().tolist()
    if failed:
        raise RuntimeError(f"update_bn failed on {failed} other process(es) of the group; see the error there")
    moments.load_sums(together[len(header) :])
    return Seen(batches, samples, calls)


@contextmanager
def telling_others(group: distributed.ProcessGroup | None, moments: Moments | None, layers: int) -> Iterator[None]:
    """On an error take part in the others' `add_up` all the same, so that they fail too and do not wait for ever.

    Args:
        group: of processes; None if there are no others.
        moments: of this process.
        layers: how many there are.
    """
    try:
        yield
    except Exception:
        if group is not None and moments is not None:
            sums = torch.zeros_like(moments.sums())
            distributed.all_reduce(torch.cat([_header(sums, 1, Seen(0, 0, [0] * layers)), sums]), group=group)
        raise


def _header(sums: Tensor, failed: int, seen: Seen) -> Tensor:
    return sums.new_tensor([failed, seen.batches, seen.samples, *seen.calls])
