"""The gate before every timing: statistics that are wrong get no time.

The reference is put together in float64 from the statistics that each batch leaves at a momentum of 1. The last batch
is cut in half, so that weighting batches equally and by their size differ; one that is alone comes whole before.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.batch_norm.cases import Workload
from benchmarks.batch_norm.providers import TORCH, Provider

YES = "yes"
OPERATIONS = 8
"""Roundings in float32 for each batch: fvcore's variance takes eight, torch's mean and variance three."""
SAMPLES = 32
"""Of a batch at most, since what is computed of it does not depend on their number, and a CPU takes long."""
REPEATS, MOST = 4, 1e-2
"""How many times torch's difference from itself is allowed to all, and the most that is allowed for that reason."""

Statistics = Sequence[tuple[Tensor, Tensor]]
"""Each layer's mean and variance."""


@dataclass(frozen=True)
class Verdicts:
    """What the gate found.

    Args:
        words: by provider, "yes", "wrong: ..." or "skipped: ..." (a peer that is missing, or that refuses the model).
        seconds: about how long a pass over the workload's batches takes; 0 if no provider is right.
    """

    words: Mapping[str, str]
    seconds: float


def verify(workload: Workload, providers: Mapping[str, Provider]) -> Verdicts:
    """Let each provider recompute the statistics, and compare them.

    Args:
        workload: its model's statistics are changed.
        providers: by name.
    """
    *others, last = (batch[:SAMPLES] for batch in workload.batches)
    batches = [*(others or [last]), last[: len(last) // 2]]
    expected = reference(workload, batches)
    allowed = OPERATIONS * len(batches) * torch.finfo(torch.float32).eps
    if workload.device.type != "cpu":
        # Kernels that add up in any order give other activations in each pass, which no averaging can undo.
        one, other = (_after(providers[TORCH], workload, batches) for _ in range(2))
        allowed = max(allowed, min(MOST, allowed + REPEATS * distance(one, other)))
    words: dict[str, str] = {}
    seconds = []
    bits = None
    # torch first, since one of the others promises its bits.
    for name in sorted(providers, key=lambda name: name != TORCH):
        provider = providers[name]
        start = time.perf_counter()
        try:
            found = _after(provider, workload, batches)
        except Exception as error:
            words[name] = _refusal(error, provider)
            continue
        seconds.append(time.perf_counter() - start)
        error = distance(found, expected[provider.pooled], provider.squares)
        counters = {int(layer.num_batches_tracked) for layer in workload.layers}
        # Negated, so that NaN is wrong too.
        if not error <= allowed:
            words[name] = f"wrong: off by {error:.2g}, {allowed:.2g} allowed"
        elif provider.ours and counters != {len(batches)}:
            words[name] = f"wrong: the counters are {sorted(counters)} after {len(batches)} batches"
        elif provider.same_bits and bits is not None and not _equal(found, bits):
            words[name] = f"wrong: not the bits of {TORCH}"
        else:
            words[name] = YES
            if name == TORCH and workload.device.type == "cpu":
                bits = found
    share = sum(map(len, batches)) / sum(map(len, workload.batches))
    return Verdicts(words, statistics.median(seconds) / share if seconds else 0.0)


def reference(workload: Workload, batches: Sequence[Tensor]) -> dict[bool, Statistics]:
    """The statistics in float64.

    Args:
        workload: its model's statistics are changed.
        batches: of the pass.

    Returns:
        Under True those of all values together, under False the means of the batches' means and unbiased variances.
    """
    layers = workload.layers
    seen: list[list[tuple[int, Tensor, Tensor]]] = [[] for _ in layers]

    def keep(index: int, module: torch.nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        mean, var = (getattr(layers[index], name).double() for name in ("running_mean", "running_var"))
        seen[index].append((inputs[0].numel() // inputs[0].shape[1], mean, var))

    hooks = [layer.register_forward_hook(partial(keep, index)) for index, layer in enumerate(layers)]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = 1.0
    workload.model.train()
    with torch.no_grad(), workload.computing():
        for batch in batches:
            workload.model(batch.to(workload.device))
    workload.model.eval()
    for layer, hook, momentum in zip(layers, hooks, momenta, strict=True):
        hook.remove()
        layer.momentum = momentum
    return {pooled: [_together(calls, pooled) for calls in seen] for pooled in (False, True)}


def _together(calls: Sequence[tuple[int, Tensor, Tensor]], pooled: bool) -> tuple[Tensor, Tensor]:
    if not pooled:
        return sum(mean for _, mean, _ in calls) / len(calls), sum(var for _, _, var in calls) / len(calls)
    total = sum(count for count, _, _ in calls)
    center = sum(count * mean for count, mean, _ in calls) / total
    squares = sum((count - 1) * var + count * (mean - center) ** 2 for count, mean, var in calls)
    return center, squares / total


def distance(found: Statistics, expected: Statistics, squares: bool = False) -> float:
    """The largest difference between statistics.

    Args:
        found: of each layer.
        expected: of each layer.
        squares: measure variances in means of squares, from which they were computed.

    Returns:
        Of the means in units of the mean and the standard deviation together, of the variances in variances.
    """
    worst = 0.0
    for (mean, var), (right_mean, right_var) in zip(found, expected, strict=True):
        scales = right_mean.abs() + right_var.sqrt(), right_var + right_mean**2 if squares else right_var
        for one, other, scale in zip((mean, var), (right_mean, right_var), scales, strict=True):
            difference = (one - other).abs()
            # A channel that is 0 throughout has no scale, and must be found to be 0.
            quotient = torch.where(difference == 0, 0.0, difference / scale).max().item()
            if not quotient <= worst:
                worst = quotient
    return worst


def _after(provider: Provider, workload: Workload, batches: Sequence[Tensor]) -> Statistics:
    """The statistics that a provider leaves, from a start at which those of another one are gone."""
    for layer in workload.layers:
        layer.reset_running_stats()
    provider.run(workload, batches)
    return [(layer.running_mean.double(), layer.running_var.double()) for layer in workload.layers]


def _equal(found: Statistics, expected: Statistics) -> bool:
    pairs = zip(found, expected, strict=True)
    return all(torch.equal(one, other) for ours, theirs in pairs for one, other in zip(ours, theirs, strict=True))


def _refusal(error: Exception, provider: Provider) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"skipped: {(error.name or 'a module').split('.')[0]} is not installed"
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return f"{'wrong: raised' if provider.ours else 'skipped:'} {reason[:200]}"
