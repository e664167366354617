"""How the time of a call is taken, on a CPU and on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from benchmarks.measure import Call, Times


class CPUClock:
    """Time on the host, for work that is done when the call returns.

    Of a call that gets one run a round the working set is larger than the caches, and nothing is to be warmed up.
    """

    def block(self, call: Call, count: int, times: Times) -> None:
        if count > 1:
            call()
        runs = []
        for _ in range(count):
            start = time.perf_counter_ns()
            call()
            runs.append((time.perf_counter_ns() - start) / 1e3)
        times.runs.append(runs)


class ReportedClock:
    """Time that each call takes of a part of itself, and returns in microseconds."""

    def block(self, call: Callable[[], float], count: int, times: Times) -> None:
        if count > 1:
            call()
        times.runs.append([call() for _ in range(count)])


class PassClock:
    """Time on the host until a call's work is done, the wait for a GPU included: for calls too long to be repeated.

    Args:
        device: on which the calls run.
    """

    def __init__(self, device: torch.device) -> None:
        self._wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def block(self, call: Call, count: int, times: Times) -> None:
        """Run a call `count` times, with no uncounted one before: within a call its first batch warms up the others."""
        runs = []
        for _ in range(count):
            self._wait()
            start = time.perf_counter_ns()
            call()
            self._wait()
            runs.append((time.perf_counter_ns() - start) / 1e3)
        times.runs.append(runs)


class CUDAClock:
    """Time on the device between two events, the host's time for a call, and the time of calls in a row.

    The device is kept asleep while the host prepares a run, so that its time holds no gaps from the host, except where
    the call itself waits for the device. The pair of events adds a microsecond or two.
    """

    def __init__(self) -> None:
        cycles = 20_000_000
        torch.cuda._sleep(cycles)
        self._cycles = cycles / self._between(lambda: torch.cuda._sleep(cycles), 0.0)

    def block(self, call: Call, count: int, times: Times) -> None:
        call()
        host = []
        for _ in range(count):
            torch.cuda.synchronize()
            start = time.perf_counter_ns()
            call()
            host.append((time.perf_counter_ns() - start) / 1e3)
        asleep = 1.5 * max(host) + 50
        torch.cuda.synchronize()
        start = time.perf_counter_ns()
        for _ in range(count):
            call()
        torch.cuda.synchronize()
        times.wall.append((time.perf_counter_ns() - start) / 1e3 / count)
        times.runs.append([self._between(call, asleep) for _ in range(count)])
        times.host.append(host)

    def _between(self, call: Call, asleep: float) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        if asleep:
            torch.cuda._sleep(int(asleep * self._cycles))
        start.record()
        call()
        end.record()
        end.synchronize()
        return 1e3 * start.elapsed_time(end)


def device_launches(call: Call) -> int | None:
    """How many kernels, copies and fills a call starts on the GPU.

    Args:
        call: run twice.

    Returns:
        The number, or None where the profiler can't see the device.
    """
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    cuda = torch.autograd.DeviceType.CUDA
    return sum(event.device_type == cuda for event in profile.events() or ()) or None
