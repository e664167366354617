"""One library's update of one case: the original and fastswa's stand-in take turns."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from benchmarks import record
from benchmarks.cases import Shapes
from benchmarks.clocks import CPUClock, CUDAClock, device_launches
from benchmarks.integrations.check import OURS, prepare
from benchmarks.measure import Times, measure, ratio, ratio_percentiles
from benchmarks.one_case import settle_allocator
from benchmarks.record import Environment
from benchmarks.verify import UPDATES, YES


@dataclass(frozen=True)
class PairRow(Environment):
    """One measurement of a library's update; empty where nothing was timed or a device has no such quantity.

    Args:
        library: a key of `LIBRARIES`.
        version: of the library.
        case: a key of `cases.CASES`.
        implementation: "original" or "fastswa".
        tensors: parameters.
        buffers: of the model.
        elements: of the parameters.
        p20_us, p50_us, p80_us: percentiles over all runs; on a GPU of the time on the device.
        ratio_to_fastswa: median over the rounds of this time over fastswa's.
        ratio_p20, ratio_p80: percentiles over the rounds of the same.
        host_us: median time until the call returns, with the GPU idle at its start.
        wall_us: median over the rounds of the mean time of calls in a row, the wait for the GPU included.
        wall_ratio_to_fastswa: this wall time over fastswa's.
        launches: kernels, copies and fills that one call starts on the GPU.
        disturbed: of the nine rounds, how many were measured while other processes ran.
        checked: "yes", or why there is no time: "wrong: ..." or "skipped: ...".
    """

    library: str
    version: str
    case: str
    implementation: str
    tensors: int
    buffers: int
    elements: int
    p20_us: float | None
    p50_us: float | None
    p80_us: float | None
    ratio_to_fastswa: float | None
    ratio_p20: float | None
    ratio_p80: float | None
    host_us: float | None
    wall_us: float | None
    wall_ratio_to_fastswa: float | None
    launches: int | None
    disturbed: int
    checked: str


def measure_pair(
    library: str,
    version: str,
    case: str,
    device: torch.device,
    seconds: float,
    command: str,
    verdicts: Mapping[str, str],
) -> list[PairRow]:
    """Time both in turns, in the state of the CPU's allocator that suits updates with temporaries best.

    Args:
        library: a file of this folder.
        version: of the library.
        case: a key of `cases.CASES`.
        device: where the model is.
        seconds: to spend on timing.
        command: to be recorded.
        verdicts: of `check_pair`.

    Returns:
        A row for each, with no times where fastswa's result was wrong.
    """
    torch.manual_seed(0)
    facts = record.environment(device, command)
    model = Shapes(case, device=device)
    right = [name for name, verdict in verdicts.items() if verdict == YES]
    prepared = {name: prepare(library, name, model) for name in right}
    for ready in prepared.values():
        for _ in range(UPDATES):
            ready.update()
    if device.type == "cpu":
        settle_allocator()
    clock = CUDAClock() if device.type == "cuda" else CPUClock()
    times, disturbed = measure({name: ready.update for name, ready in prepared.items()}, clock, seconds)
    rows = []
    for name, verdict in verdicts.items():
        values = dict.fromkeys(MEASURED) | _values(times, name)
        if device.type == "cuda" and name in prepared:
            values["launches"] = device_launches(prepared[name].update)
        rows.append(
            PairRow(
                **facts,  # type: ignore[arg-type]
                library=library,
                version=version,
                case=case,
                implementation=name,
                tensors=len(list(model.parameters())),
                buffers=len(list(model.buffers())),
                elements=sum(tensor.numel() for tensor in model.parameters()),
                disturbed=disturbed,
                checked=verdict,
                **values,  # type: ignore[arg-type]
            )
        )
    return rows


MEASURED = (
    *("p20_us", "p50_us", "p80_us", "ratio_to_fastswa", "ratio_p20", "ratio_p80"),
    *("host_us", "wall_us", "wall_ratio_to_fastswa", "launches"),
)


def _values(times: Mapping[str, Times], name: str) -> dict[str, float]:
    if name not in times:
        return {}
    own = times[name]
    values = {f"p{percent}_us": own.percentile(percent) for percent in (20, 50, 80)}
    if OURS in times:
        values["ratio_to_fastswa"] = ratio(own, times[OURS])
        values["ratio_p20"], values["ratio_p80"] = ratio_percentiles(own, times[OURS])
    if own.wall:
        values["host_us"] = statistics.median(run for block in own.host for run in block)
        values["wall_us"] = statistics.median(own.wall)
        if OURS in times:
            walls = zip(own.wall, times[OURS].wall, strict=True)
            values["wall_ratio_to_fastswa"] = statistics.median(one / other for one, other in walls)
    return values
