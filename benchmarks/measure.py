"""Times of several calls that take turns, so that a noisy or drifting machine is equally unfair to all.

Each round gives every call a block of consecutive runs, in an order shuffled by a fixed seed. Ratios are taken within a
round, and then their median and percentiles over the rounds.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from benchmarks.disturbance import LIMIT, Disturbance, wait_until_alone

ROUNDS, FEWEST_ROUNDS = 9, 5
TRIED, MOST = 3, 100
"""Runs of a trial, and at most of a block."""
PATIENCE = 1

Call = Callable[[], object]


@dataclass
class Times:
    """Microseconds of one call, in one list a round.

    Args:
        runs: each counted run; on a GPU the time between two events on the device.
        host: each run's time on the host until the call returns; on a GPU only.
        wall: mean time of consecutive runs, the wait for the device included; on a GPU only.
    """

    runs: list[list[float]] = field(default_factory=list)
    host: list[list[float]] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)

    def extend(self, more: Times) -> None:
        """Add the rounds of other times.

        Args:
            more: of the same call.
        """
        self.runs += more.runs
        self.host += more.host
        self.wall += more.wall

    def scaled(self, factor: float) -> Times:
        """All times multiplied, for a call that did a part of the work.

        Args:
            factor: how many times the call would have to run.
        """
        runs, host = ([[factor * run for run in block] for block in blocks] for blocks in (self.runs, self.host))
        return Times(runs, host, [factor * mean for mean in self.wall])

    def percentile(self, percent: float) -> float:
        """Over the runs of all rounds."""
        return float(np.percentile([run for block in self.runs for run in block], percent))


def ratio(slow: Times, fast: Times) -> float:
    """How many times longer one call takes than another.

    Args:
        slow: times of the one.
        fast: times of the other, in the same rounds.

    Returns:
        The median over the rounds of the ratio of the blocks' medians.
    """
    pairs = zip(slow.runs, fast.runs, strict=True)
    return statistics.median(statistics.median(one) / statistics.median(other) for one, other in pairs)


def ratio_percentiles(slow: Times, fast: Times) -> tuple[float, float]:
    """How far `ratio` scatters from round to round.

    Args:
        slow: times of the one.
        fast: times of the other, in the same rounds.

    Returns:
        The 20 and 80 % percentiles over the rounds of the ratio of the blocks' medians.
    """
    pairs = zip(slow.runs, fast.runs, strict=True)
    ratios = [statistics.median(one) / statistics.median(other) for one, other in pairs]
    return float(np.percentile(ratios, 20)), float(np.percentile(ratios, 80))


class Clock(Protocol):
    """Runs blocks of calls."""

    def block(self, call: Call, count: int, times: Times) -> None:
        """Run a call `count` times, after an uncounted one where there are several, and add a round to `times`."""


def measure(
    calls: Mapping[str, Call], clock: Clock, seconds: float, rounds: int = ROUNDS, runs: int | None = None
) -> tuple[dict[str, Times], int]:
    """Time calls in turns.

    A round that other processes disturb is repeated when they are done, until `PATIENCE` times `seconds` are lost.

    Args:
        calls: by name.
        clock: of the device on which they run.
        seconds: to spend on all of them; where one run of each takes long, they get fewer rounds, and at least
            `FEWEST_ROUNDS` however long that takes.
        rounds: how many turns each call gets.
        runs: counted ones in each block, in all rounds; left out, as many as fit into the time, which costs a trial of
            each call.

    Returns:
        Times by name, and how many of the rounds were disturbed all the same.
    """
    if runs:
        counts = dict.fromkeys(calls, runs)
    else:
        share = seconds / rounds / max(1, len(calls))
        each = _trial(calls, clock, share)
        counts = {name: min(MOST, max(1, int(share / own))) for name, own in each.items()}
        # Blocks take their share of the time, where it is longer than one run.
        turn = sum(max(own, share) for own in each.values())
        rounds = min(rounds, max(FEWEST_ROUNDS, round(seconds / turn))) if calls else rounds
    times = {name: Times() for name in calls}
    order = random.Random(0)
    names = list(calls)
    disturbed, patience = 0, PATIENCE * seconds
    collecting = gc.isenabled()
    gc.disable()
    # What is there now, libraries and models, needs no search after each round: it would take a quarter of a second.
    gc.freeze()
    try:
        while any(len(own.runs) < rounds for own in times.values()):
            order.shuffle(names)
            start, others = time.perf_counter(), Disturbance()
            turn = {name: Times() for name in names}
            for name in names:
                clock.block(calls[name], counts[name], turn[name])
            gc.collect()
            if others.share() > LIMIT:
                patience -= time.perf_counter() - start
                patience -= wait_until_alone(patience)
                if patience > 0:
                    continue
                disturbed += 1
            for name in names:
                times[name].extend(turn[name])
    finally:
        gc.unfreeze()
        if collecting:
            gc.enable()
    return times, disturbed


def _trial(calls: Mapping[str, Call], clock: Clock, seconds: float) -> dict[str, float]:
    """Seconds of a run of each call, the clock's own pauses included."""
    each = {}
    for name, call in calls.items():
        for count in (1, TRIED):
            start = time.perf_counter()
            clock.block(call, count, Times())
            each[name] = (time.perf_counter() - start) / count
            if each[name] > seconds:
                break
    return each
