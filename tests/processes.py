"""Cases that several gloo processes run together: each runs all cases of some modules, and says how each ended."""

from __future__ import annotations

import gc
import importlib
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

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


def start(work: Callable[..., None], world: int, *arguments: Any) -> list[BaseProcess]:
    """Start processes, forked from one that has imported what all of them need.

    Args:
        work: a function of a module, of the rank and the other arguments.
        world: how many processes.
        *arguments: the same for all.

    Returns:
        The processes, by rank.
    """
    context = get_context("forkserver")
    # Each alone would spend seconds on these; torch._dynamo is what torch.compile imports.
    context.set_forkserver_preload([__name__, "tests.sharded_models", "torch._dynamo", "torch.distributed.checkpoint"])
    processes = [context.Process(target=work, args=(rank, *arguments), daemon=True) for rank in range(world)]
    for process in processes:
        process.start()
    return processes


def run(modules: Sequence[str], world: int, directory: Path) -> dict[str, list[str | None]]:
    """Run all cases of some modules on several processes.

    Args:
        modules: with the cases.
        world: how many processes.
        directory: for what they share.

    Returns:
        For each case and rank the traceback of its failure, or None.
    """
    processes = start(run_cases, world, modules, world, directory)
    for process in processes:
        process.join(5 * TIMEOUT)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0] * world, codes
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


def run_cases(rank: int, modules: Sequence[str], world: int, directory: Path) -> None:
    """Be one of the processes.

    Args:
        rank: which.
        modules: with the cases.
        world: how many processes.
        directory: for what they share.
    """
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
