"""Times updates that are not like the others: the first one, and the one that finds a tensor in other memory."""

from __future__ import annotations

import gc
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
from torch import nn

from benchmarks.cases import Shapes
from benchmarks.clocks import ReportedClock
from benchmarks.measure import Times, measure
from benchmarks.one_case import settle_allocator
from benchmarks.process import in_fresh_process
from benchmarks.providers import PLANS, PROVIDERS, Plan, Prepared, Provider
from benchmarks.verify import verify

PLAN = PLANS["fp32"]
CONSTRUCTED, FIRST, CACHED_KERNELS = "construction", "first update", "first update, kernels compiled before"
FIRSTS = (CONSTRUCTED, FIRST, CACHED_KERNELS)
ORDINARY, ONE_MOVED, ALL_MOVED = "ordinary update", "one tensor moved", "all tensors moved"
MOVES = (ORDINARY, ONE_MOVED, ALL_MOVED)


def first_updates(case: str, names: Iterable[str], device: torch.device, rounds: int) -> dict[str, dict[str, Times]]:
    """The time of construction and of the first update, each in a process that has computed nothing before.

    Args:
        case: a key of `cases.CASES`.
        names: keys of `PROVIDERS`.
        device: where the model is.
        rounds: turns of each provider.

    Returns:
        By quantity, then by provider. On a GPU Triton's cache is empty at "first update".
    """
    times: dict[str, dict[str, Times]] = {}
    for _ in range(rounds):
        for name in names:
            with tempfile.TemporaryDirectory() as folder:
                found = in_fresh_process(first_update, case, name, device, folder)
                if device.type == "cuda":
                    found[CACHED_KERNELS] = in_fresh_process(first_update, case, name, device, folder)[FIRST]
            for quantity, microseconds in found.items():
                times.setdefault(quantity, {}).setdefault(name, Times()).runs.append([microseconds])
    return times


def first_update(case: str, name: str, device: torch.device, folder: str) -> dict[str, float]:
    """Construct a provider and update once, in this process.

    Args:
        case: a key of `cases.CASES`.
        name: a key of `PROVIDERS`.
        device: where the model is.
        folder: for Triton's compiled kernels.

    Returns:
        Microseconds by quantity.
    """
    os.environ["TRITON_CACHE_DIR"] = folder
    torch.manual_seed(0)
    model = Shapes(case, PLAN.source, device)
    ready: list[Prepared] = []
    # A search for garbage among all that was imported takes 0.1 s here, and would fall to either of the two by chance.
    gc.freeze()
    constructed = timed(device, lambda: ready.append(PROVIDERS[name].setup(model, PLAN)))
    return {CONSTRUCTED: constructed, FIRST: timed(device, ready[0].update)}


def moved_updates(
    case: str, providers: Mapping[str, Provider], device: torch.device, seconds: float
) -> tuple[dict[str, dict[str, Times]], dict[str, dict[str, str]]]:
    """The time of updates after `parameter.data = ...`, and of ordinary ones.

    Args:
        case: a key of `cases.CASES`.
        providers: by name.
        device: where the model is.
        seconds: to spend on each quantity.

    Returns:
        Times of what is right, and verdicts as `verify` gives them, both by quantity, then by provider.
    """
    times: dict[str, dict[str, Times]] = {}
    verdicts: dict[str, dict[str, str]] = {}
    for quantity in MOVES:
        torch.manual_seed(0)
        model = Shapes(case, PLAN.source, device)
        moves = {name: replace(own, setup=_moving(quantity, own, device)) for name, own in providers.items()}
        prepared, verdicts[quantity] = verify(model, PLAN, moves)
        if device.type == "cpu":
            settle_allocator()
        times[quantity] = measure({name: own.update for name, own in prepared.items()}, ReportedClock(), seconds)[0]
    return times, verdicts


def _moving(quantity: str, provider: Provider, device: torch.device) -> Callable[[nn.Module, Plan], Prepared]:
    """A provider whose update first moves tensors of the model, and gives the microseconds that the rest takes."""

    def setup(model: nn.Module, plan: Plan) -> Prepared:
        ready = provider.setup(model, plan)
        moved = list(model.parameters())[: {ORDINARY: 0, ONE_MOVED: 1, ALL_MOVED: None}[quantity]]

        def update() -> float:
            for parameter in moved:
                parameter.data = parameter.data.clone()
            return timed(device, ready.update)

        return replace(ready, update=update)

    return setup


def timed(device: torch.device, call: Callable[[], object]) -> float:
    """Microseconds until a call's work is done.

    Args:
        device: where that is.
        call: run once.
    """
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter_ns()
    call()
    wait()
    return (time.perf_counter_ns() - start) / 1e3
