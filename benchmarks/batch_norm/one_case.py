"""One case of the recomputation's benchmark: providers are checked, and those that are right take turns."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

from benchmarks import record
from benchmarks.batch_norm import counts, providers
from benchmarks.batch_norm.cases import prepare
from benchmarks.batch_norm.providers import OURS
from benchmarks.batch_norm.verify import YES, verify
from benchmarks.clocks import PassClock
from benchmarks.measure import ROUNDS, Times, measure, ratio, ratio_percentiles

FEWEST_ROUNDS = 3
MOST_PASSES = 5
"""Of a provider in a round."""


@dataclass(frozen=True)
class Row(record.Environment):
    """One measurement; empty where a device has no such quantity or where nothing was timed.

    Args:
        fvcore: version.
        case: a key of `cases.CASES`.
        precision: one of `cases.PRECISIONS`.
        batches_from: one of `cases.SOURCES`.
        provider: a key of `providers.PROVIDERS`.
        layers: of BatchNorm.
        channels: of all those layers.
        batch_size: samples of a batch.
        batches: of a pass.
        p20_ms, p50_ms, p80_ms: percentiles over all passes of the time of a pass, shared among its batches; on a GPU
            until its work is done.
        ratio_to_fastswa: median over the rounds of this time over that of fastswa's default.
        ratio_p20, ratio_p80: percentiles over the rounds of the same.
        device_reads_per_batch: numbers for which the host waits for the device; on a CPU those for which it would
            (`counts.ReadCounter`).
        host_reads_per_batch: numbers read without a wait.
        launches_per_batch: kernels, copies and fills that a batch starts on the GPU.
        rounds: in which the providers took turns.
        disturbed: of the rounds, how many were measured while other processes ran.
        checked: "yes", or why there is no time: "wrong: ..." or "skipped: ...".
    """

    fvcore: str
    case: str
    precision: str
    batches_from: str
    provider: str
    layers: int
    channels: int
    batch_size: int
    batches: int
    p20_ms: float | None
    p50_ms: float | None
    p80_ms: float | None
    ratio_to_fastswa: float | None
    ratio_p20: float | None
    ratio_p80: float | None
    device_reads_per_batch: float | None
    host_reads_per_batch: float | None
    launches_per_batch: float | None
    rounds: int
    disturbed: int
    checked: str


def measure_case(
    case: str, precision: str, source: str, device: torch.device, seconds: float, command: str
) -> list[Row]:
    """Time every provider on one case that gives the right result.

    Args:
        case: a key of `cases.CASES`.
        precision: one of `cases.PRECISIONS`.
        source: one of `cases.SOURCES`.
        device: where the model is.
        seconds: to spend on timing; slow cases take longer, for `FEWEST_ROUNDS` passes of each provider.
        command: to be recorded.

    Returns:
        A row for each provider, with no times for those that were skipped or wrong.
    """
    facts = record.environment(device, command)
    workload = prepare(case, precision, source, device)
    verdicts = verify(workload, providers.PROVIDERS)
    right = [name for name in providers.PROVIDERS if verdicts.words[name] == YES]
    turn = len(right) * max(verdicts.seconds, 1e-6)
    rounds = min(ROUNDS, max(FEWEST_ROUNDS, round(seconds / turn)))
    passes = min(MOST_PASSES, max(1, int(seconds / rounds / turn)))
    calls = {name: (lambda provider=providers.PROVIDERS[name]: provider.run(workload)) for name in right}
    times, disturbed = measure(calls, PassClock(device), seconds, rounds, passes)
    rows = []
    for name, provider in providers.PROVIDERS.items():
        values = dict.fromkeys(MEASURED) | _times(times, name, len(workload.batches))
        if name in right:
            values["device_reads_per_batch"], values["host_reads_per_batch"] = counts.reads(provider, workload)
            if device.type == "cuda":
                values["launches_per_batch"] = counts.launches(provider, workload)
        rows.append(
            Row(
                **facts,  # type: ignore[arg-type]
                fvcore=_fvcore(),
                case=case,
                precision=precision,
                batches_from=source,
                provider=name,
                layers=len(workload.layers),
                channels=sum(layer.num_features for layer in workload.layers),
                batch_size=len(workload.batches[0]),
                batches=len(workload.batches),
                rounds=rounds,
                disturbed=disturbed,
                checked=verdicts.words[name],
                **values,
            )
        )
    return rows


MEASURED = (
    *("p20_ms", "p50_ms", "p80_ms", "ratio_to_fastswa", "ratio_p20", "ratio_p80"),
    *("device_reads_per_batch", "host_reads_per_batch", "launches_per_batch"),
)


def _times(times: dict[str, Times], name: str, batches: int) -> dict[str, float]:
    if name not in times:
        return {}
    values = {f"p{percent}_ms": times[name].percentile(percent) / 1e3 / batches for percent in (20, 50, 80)}
    if OURS in times:
        values["ratio_to_fastswa"] = ratio(times[name], times[OURS])
        values["ratio_p20"], values["ratio_p80"] = ratio_percentiles(times[name], times[OURS])
    return values


def _fvcore() -> str:
    try:
        return version("fvcore")
    except PackageNotFoundError:
        return "not installed"
