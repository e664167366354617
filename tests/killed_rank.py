"""One of the processes of test_killed_rank.py: python -m tests.killed_rank RANK DIRECTORY HOW WHERE."""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import timedelta

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


def main() -> None:
    """Train a step, then lose rank 1 before what all ranks do together."""
    rank, directory, how, where = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{directory}/meeting-{how}-{where}",
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
    if rank == 1:
        leave(how)
    start = time.monotonic()
    try:
        if where == "construction":
            WeightAverages(model, SWA())
        elif averages is not None:
            averages.weights(full=True)
        else:
            average_across_ranks_(model)
    except Exception as error:
        print(f"{type(error).__name__} after {time.monotonic() - start:.0f} s")
        # Not the orderly end, which would wait for the other rank.
        sys.stdout.flush()
        os._exit(3)


if __name__ == "__main__":
    main()
