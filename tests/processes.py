"""Cases that several gloo processes run together: each runs all cases of some modules, and says how each ended."""

from __future__ import annotations

import gc
import importlib
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed

TIMEOUT = 60
"""Seconds that a collective may take; only a hang does."""


@dataclass(frozen=True)
class Ranks:
    """What a case knows of its process and the others.

    Args:
        rank: of this process.
        world: how many there are.
        directory: that all share.
    """

    rank: int
    world: int
    directory: Path


Case = Callable[[Ranks], None]


def cases(modules: Sequence[str]) -> list[str]:
    """The cases of some modules, in their order: functions `case_...` of one argument, which all ranks call.

    Args:
        modules: such as "tests.sharded_cases".
    """
    return [
        f"{module}.{name}"
        for module in modules
        for name in vars(importlib.import_module(module))
        if name.startswith("case_")
    ]


def run(modules: Sequence[str], world: int, directory: Path) -> dict[str, list[str | None]]:
    """Run all cases of some modules on several processes.

    Args:
        modules: with the cases.
        world: how many processes.
        directory: for what they share.

    Returns:
        For each case and rank the traceback of its failure, or None.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.processes", ",".join(modules), str(world), str(directory)]
    processes = [
        subprocess.Popen([*command, str(rank)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(world)
    ]
    printed = [process.communicate(timeout=5 * TIMEOUT)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * world, printed
    ended = [torch.load(directory / f"ended-{rank}.pt") for rank in range(world)]
    return {
        case: [each.get(case, "not run, because one before it failed") for each in ended] for case in cases(modules)
    }


def assert_passed(outcome: dict[str, list[str | None]], case: str) -> None:
    """A case must have ended well on every rank.

    Args:
        outcome: as `run` gave it.
        case: its name.
    """
    failures = {rank: failure for rank, failure in enumerate(outcome[case]) if failure is not None}
    assert not failures, "\n".join(f"on rank {rank}: {failure}" for rank, failure in failures.items())


def main() -> None:
    """Be one of the processes: python -m tests.processes MODULE,MODULE WORLD DIRECTORY RANK."""
    modules, world, directory, rank = sys.argv[1].split(","), int(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{directory}/meeting",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=TIMEOUT),
    )
    ended: dict[str, str | None] = {}
    for name in cases(modules):
        module, function = name.rsplit(".", 1)
        case: Case = getattr(importlib.import_module(module), function)
        torch.manual_seed(0)
        try:
            case(Ranks(rank, world, directory))
        except BaseException:
            ended[name] = traceback.format_exc()
        else:
            ended[name] = None
        torch.save(ended, directory / f"ended-{rank}.pt")
        # Where one failed the others may be in the middle of it, and what they would say next is no use.
        failed = torch.tensor(float(ended[name] is not None))
        distributed.all_reduce(failed)
        if failed:
            break
    # Models in reference cycles hold process groups, whose threads abort an interpreter that ends before them.
    gc.collect()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
