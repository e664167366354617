"""What the processes of test_killed_rank.py do."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from fastswa import SWA, WeightAverages, average_across_ranks_

TIMEOUT = 4
"""Seconds that a collective waits for a rank."""


def leave(how: str) -> None:
    """Be killed, or hang for much longer than anyone waits."""
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)


def lose_a_rank(rank: int, directory: Path, how: str, where: str) -> None:
    """Lose rank 1 before what all ranks do together.

    Args:
        rank: of this process.
        directory: where the ranks meet; rank 0 writes its error there.
        how: "killed" or "hangs".
        where: rank 1 is lost before this: "construction", "export" or "mean".
    """
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{directory}/meeting",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=TIMEOUT),
    )
    model = nn.Linear(3, 3)
    if where != "mean":
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    averages = WeightAverages(model, SWA()) if where == "export" else None
    if averages is not None:
        averages.update()
    # Not while rank 0 still connects to it.
    ready = directory / "ready"
    if rank == 1:
        while not ready.exists():
            time.sleep(0.01)
        leave(how)
    ready.touch()
    try:
        if where == "construction":
            WeightAverages(model, SWA())
        elif averages is not None:
            averages.weights(full=True)
        else:
            average_across_ranks_(model)
    except Exception as error:
        (directory / "error").write_text(f"{type(error).__name__}: {error}")
        # Not the orderly end, which would wait for the other rank.
        os._exit(3)
