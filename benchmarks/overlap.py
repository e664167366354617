"""What averaging adds to a training step: in line, on a side stream under the next step, and in a thread on the CPU."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import fastswa
from benchmarks import record
from benchmarks.clocks import PassClock
from benchmarks.measure import ROUNDS, Times, measure
from benchmarks.networks import ResNet50
from benchmarks.process import in_fresh_process
from benchmarks.record import Environment
from benchmarks.table import short
from benchmarks.verify import YES, tolerance
from benchmarks.weight_averages import DECAYS

CASE = "resnet50"
SAMPLE = (32, 3, 224, 224)
STEPS = 20
"""In a row, as in training: the last update has no next step to hide under, so at most 19/20 can be hidden."""
CHECKED_STEPS = 3


@dataclass(frozen=True)
class Variant:
    """A way to average during training.

    Args:
        averages: kept; none for training alone.
        options: of WeightAverages.
    """

    averages: int
    options: Mapping[str, Any] = field(default_factory=dict)


ALONE, IN_LINE, BESIDE, OFFLOADED = "no averaging", "in line", "overlap", "offload to the CPU"
VARIANTS = {
    ALONE: Variant(0),
    # Four averages, or what they add to a step would be lost in its noise.
    IN_LINE: Variant(4),
    BESIDE: Variant(4, {"overlap": True}),
    OFFLOADED: Variant(1, {"device": "cpu"}),
}


@dataclass(frozen=True)
class Row(Environment):
    """One way to average during training.

    Args:
        case: the network.
        batch: its samples.
        variant: a key of `VARIANTS`.
        averages: kept.
        p20_ms, p50_ms, p80_ms: of a step, over the rounds.
        added_ms: median over the rounds of what a step takes longer than without averaging.
        share_hidden: of what averaging in line adds, the part that overlap takes away.
        host_us: median time until `update` returns.
        disturbed: of the nine rounds, how many were measured while other processes ran.
        checked: "yes", or why there is no time.
    """

    case: str
    batch: int
    variant: str
    averages: int
    p20_ms: float | None
    p50_ms: float | None
    p80_ms: float | None
    added_ms: float | None
    share_hidden: float | None
    host_us: float | None
    disturbed: int
    checked: str


def run(device: torch.device, command: str, output: Path | None) -> bool:
    """Measure on a GPU, print a table, write a CSV file beside the one of the updates.

    Args:
        device: to be measured.
        command: to be recorded.
        output: of the updates; None for the default.

    Returns:
        Whether every result was right.
    """
    if device.type != "cuda":
        print("overlap, offload: not measured: needs a GPU")
        return True
    try:
        rows = in_fresh_process(measure_steps, ResNet50, SAMPLE, device, command)
    except (BrokenProcessPool, torch.OutOfMemoryError) as error:
        print(f"overlap, offload: {error}", file=sys.stderr)
        return False
    print(table(rows))
    prefix = "overlap-"
    path = output.with_name(prefix + output.name) if output else record.default_path(device, prefix)
    record.write(path, rows, Row)
    print(f"{len(rows)} measurements in {path}")
    return all(row.checked == YES for row in rows)


class Training:
    """Steps of forward and backward pass and SGD on one batch, with averages or without.

    Args:
        network: to be trained.
        sample: shape of the batch.
        device: where it is.
        variant: how to average.
    """

    def __init__(
        self, network: Callable[[], nn.Module], sample: Sequence[int], device: torch.device, variant: Variant
    ) -> None:
        self.model = network().to(device)
        self._samples = torch.randn(*sample, device=device)
        self._labels = torch.randint(10, sample[:1], device=device)
        self._optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)
        self._decays = DECAYS[: variant.averages]
        rules = {str(decay): fastswa.EMA(decay) for decay in self._decays}
        self._averages = fastswa.WeightAverages(self.model, rules, **variant.options) if rules else None
        self.host: list[float] = []
        """Microseconds until each update returned."""

    def steps(self, count: int, after: Callable[[int], None] = lambda step: None) -> None:
        """Train, and wait for the last update.

        Args:
            count: steps.
            after: called with the number of each step that is done.
        """
        for step in range(count):
            self._optimizer.zero_grad()
            cross_entropy(self.model(self._samples), self._labels).backward()
            self._optimizer.step()
            if self._averages is not None:
                start = time.perf_counter_ns()
                self._averages.update()
                self.host.append((time.perf_counter_ns() - start) / 1e3)
            after(step)
        if self._averages is not None:
            self._averages.wait()

    @torch.no_grad()
    def check(self) -> str:
        """Train a few steps, and compare the averages with torch's lerp of the weights after each.

        Returns:
            The verdict.
        """
        expected = {str(decay): [p.detach().clone() for p in self.model.parameters()] for decay in self._decays}

        def after(step: int) -> None:
            with torch.no_grad():
                for decay in self._decays:
                    torch._foreach_lerp_(
                        expected[str(decay)], list(self.model.parameters()), 1 - decay if step else 1.0
                    )

        with torch.enable_grad():
            self.steps(CHECKED_STEPS, after)
        self.host.clear()
        for name, values in expected.items():
            averages = self._averages.weights(name) if self._averages is not None else {}
            for (tensor, _), value in zip(self.model.named_parameters(), values, strict=True):
                error = (averages[tensor].to(value.device) - value).abs().max().item()
                allowed = tolerance(torch.float32) * value.abs().max().item()
                if not error <= allowed:
                    return f"wrong: {tensor} is off by {error:.2g}, {allowed:.2g} allowed"
        return YES


def measure_steps(
    network: Callable[[], nn.Module],
    sample: Sequence[int],
    device: torch.device,
    command: str,
    steps: int = STEPS,
    rounds: int = ROUNDS,
) -> list[Row]:
    """Time the steps of every variant that averages right, in turns.

    Args:
        network: to be trained.
        sample: shape of the batch.
        device: where the training runs.
        command: to be recorded.
        steps: in a row.
        rounds: how many turns each variant gets.

    Returns:
        A row for each variant.
    """
    torch.manual_seed(0)
    facts = record.environment(device, command)
    trainings = {name: Training(network, sample, device, variant) for name, variant in VARIANTS.items()}
    verdicts = {name: training.check() for name, training in trainings.items()}
    calls = {name: partial(trainings[name].steps, steps) for name, verdict in verdicts.items() if verdict == YES}
    times, disturbed = measure(calls, PassClock(device), 1.0, rounds, runs=1)
    each = {name: own.scaled(1e-3 / steps) for name, own in times.items()}
    added = {name: _added(own, each[ALONE]) for name, own in each.items() if name != ALONE}
    rows = []
    for name, variant in VARIANTS.items():
        p20, p50, p80 = (each[name].percentile(p) if name in each else None for p in (20, 50, 80))
        hidden = None
        if name == BESIDE and BESIDE in added and added.get(IN_LINE, 0.0) > 0:
            hidden = 1 - added[BESIDE] / added[IN_LINE]
        host = trainings[name].host
        rows.append(
            Row(
                **facts,  # type: ignore[arg-type]
                case=network.__name__.lower(),
                batch=sample[0],
                variant=name,
                averages=variant.averages,
                p20_ms=p20,
                p50_ms=p50,
                p80_ms=p80,
                added_ms=added.get(name),
                share_hidden=hidden,
                host_us=statistics.median(host) if host else None,
                disturbed=disturbed,
                checked=verdicts[name],
            )
        )
    return rows


def _added(own: Times, alone: Times) -> float:
    return statistics.median(one[0] - other[0] for one, other in zip(own.runs, alone.runs, strict=True))


def table(rows: Sequence[Row]) -> str:
    """A heading, and a line for each variant.

    Args:
        rows: of one network.

    Returns:
        The lines as one text.
    """
    first = rows[0]
    lines = [
        "",
        f"training steps of {first.case}, batch {first.batch}, {first.device}",
        f"{'':20} {'averages':>8} {'p20 ms':>9} {'p50 ms':>9} {'p80 ms':>9}"
        f" {'added ms':>9} {'hidden':>9} {'host us':>9}",
    ]
    for row in rows:
        line = f"{row.variant:20} {row.averages:>8}"
        if row.p50_ms is None:
            lines.append(f"{line} {row.checked}")
            continue
        columns = (row.p20_ms, row.p50_ms, row.p80_ms, row.added_ms, row.share_hidden, row.host_us)
        lines.append(line + "".join(f" {short(value):>9}" for value in columns))
    if first.disturbed:
        lines.append(f"other processes disturbed {first.disturbed} of {ROUNDS} rounds: repeat it on a quiet machine")
    return "\n".join(lines)
