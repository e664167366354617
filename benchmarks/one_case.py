"""One case of the update's benchmark: every provider is checked, and those that are right take turns being timed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

import torch

from benchmarks import record
from benchmarks.cases import Shapes
from benchmarks.clocks import CPUClock, CUDAClock, device_launches
from benchmarks.counts import device_reads, peak_extra_bytes
from benchmarks.measure import Times, measure, ratio, ratio_percentiles
from benchmarks.providers import CEILING, PLANS, Prepared, update_bytes
from benchmarks.record import Row
from benchmarks.registry import providers_of
from benchmarks.verify import verify


def measure_case(case: str, plan: str, device: torch.device, seconds: float, command: str) -> list[Row]:
    """Time every provider on one case that gives the right result, and count what its update costs beside time.

    Args:
        case: a key of `CASES`.
        plan: a key of `PLANS`.
        device: where the model is.
        seconds: to spend on timing; slow cases take longer, for `FEWEST_ROUNDS` runs of each provider.
        command: to be recorded.

    Returns:
        A row for each provider, with no times for those that were skipped or wrong.
    """
    torch.manual_seed(0)
    facts = record.environment(device, command)
    model = Shapes(case, PLANS[plan].source, device)
    size = update_bytes(model, PLANS[plan])
    providers = providers_of(plan)
    ours = next(iter(providers))
    prepared, verdicts = verify(model, PLANS[plan], providers)
    if device.type == "cpu":
        settle_allocator()
    clock = CUDAClock() if device.type == "cuda" else CPUClock()
    times, disturbed = measure({name: ready.update for name, ready in prepared.items()}, clock, seconds)
    for name, ready in prepared.items():
        if ready.part < 1:
            times[name] = times[name].scaled(1 / ready.part)
    rows = []
    for name in providers:
        values = dict.fromkeys(MEASURED) | figures(times, name, ours, size)
        if name in prepared:
            values |= _counts(prepared[name], device)
        rows.append(
            Row(
                **facts,  # type: ignore[arg-type]
                case=case,
                plan=plan,
                provider=name,
                tensors=len(list(model.parameters())),
                buffers=len(list(model.buffers())),
                elements=sum(tensor.numel() for tensor in model.parameters()),
                bytes=size,
                rounds=max((len(own.runs) for own in times.values()), default=0),
                disturbed=disturbed,
                checked=verdicts[name],
                **values,  # type: ignore[arg-type]
            )
        )
    return rows


MEASURED = (
    *("p20_us", "p50_us", "p80_us", "gb_per_second", "share_of_ceiling"),
    *("ratio_to_fastswa", "ratio_p20", "ratio_p80", "host_us", "wall_us", "wall_ratio_to_fastswa"),
    *("launches", "device_reads", "peak_extra_bytes"),
)


def settle_allocator() -> None:
    """Free one block of 30 MB on the CPU, as training may do with its activations.

    The C library then keeps blocks of up to that size for the next temporary, where before it gave the larger ones back
    to the system each time. Without it the time of an update that allocates would be a matter of chance: torch's
    default on ResNet-50 was seen to take from 18 to 56 ms.
    """
    torch.zeros(30 << 18).add_(1)


def figures(times: Mapping[str, Times], name: str, ours: str, size: int) -> dict[str, float]:
    """Percentiles, speed and ratios of one provider.

    Args:
        times: of all that were timed, the ceiling among them.
        name: of the provider.
        ours: the one that the others are compared with.
        size: bytes that a call has to move.

    Returns:
        By the columns of a row; empty for one that was not timed.
    """
    if name not in times:
        return {}
    own = times[name]
    values = {f"p{percent}_us": own.percentile(percent) for percent in (20, 50, 80)}
    values["gb_per_second"] = size / values["p50_us"] / 1e3
    values["share_of_ceiling"] = ratio(times[CEILING], own)
    if ours in times:
        values["ratio_to_fastswa"] = ratio(own, times[ours])
        values["ratio_p20"], values["ratio_p80"] = ratio_percentiles(own, times[ours])
    if own.wall:
        values["host_us"] = statistics.median(run for block in own.host for run in block)
        values["wall_us"] = statistics.median(own.wall)
        if ours in times:
            walls = zip(own.wall, times[ours].wall, strict=True)
            values["wall_ratio_to_fastswa"] = statistics.median(one / other for one, other in walls)
    return values


def _counts(ready: Prepared, device: torch.device) -> dict[str, float | None]:
    return {
        "launches": device_launches(ready.update) if device.type == "cuda" else None,
        "device_reads": device_reads(ready.update, device),
        "peak_extra_bytes": peak_extra_bytes(ready.update, device),
    }
