"""The figures to reach on a CPU and on a GPU: ratios of times of one run, and counts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from benchmarks.batch_norm import providers as batch_norm
from benchmarks.judging import RATIO, Row, Target, Verdict, judge
from benchmarks.pictures.measurements import NAMES
from benchmarks.providers import CACHED, OURS, PLANS, TORCH
from benchmarks.registry import providers_of
from benchmarks.weight_averages import PASSES, TIMM

SMALL, LARGE = ("resnet20", "preresnet164"), ("resnet50", "vit_b", "gpt2")
PRECISIONS = {"fp32": "float32", "mixed": "bfloat16 weights, float32 average"}
TIMES_TORCH = "times as fast as torch AveragedModel"
TIMES_CACHED = f"times as fast as {CACHED}"


def _update(
    device: str, cases: Sequence[str], plan: str, provider: str, column: str, words: str, **bound: Any
) -> Target:
    named = {SMALL: "small networks", LARGE: "large networks"}.get(tuple(cases)) or ", ".join(map(NAMES.get, cases))
    rows = {"case": cases, "plan": (plan,), "provider": (provider,)}
    return Target(device, f"update, {named}, {PRECISIONS.get(plan, plan)}", "update", rows, column, words, **bound)


def _over_ceiling(case: str, plan: str, at_most: float) -> Target:
    words = "times the byte ceiling's time"
    return _update("cpu", (case,), plan, OURS, "share_of_ceiling", words, at_most=at_most, inverse=True)


def _several(device: str, at_least: float) -> Target:
    words = "times as fast as a pass for each average"
    target = _update(device, ("resnet50", "gpt2"), "fp32_k4", PASSES, RATIO, words, at_least=at_least)
    return replace(target, work="four averages in one pass, ResNet-50, GPT-2")


def _reads(device: str) -> Iterator[Target]:
    updates = {name: own for plan in PLANS for name, own in providers_of(plan).items()}
    passes = batch_norm.PROVIDERS
    for work, command, providers, column in (
        ("update, all of fastswa's", "update", updates, "device_reads"),
        ("update_bn, all of fastswa's", "update_bn", passes, "device_reads_per_batch"),
    ):
        rows = {"provider": tuple(name for name, one in providers.items() if one.ours)}
        yield Target(device, work, command, rows, column, column.replace("_", " "), at_most=0)


def _batch_norm(device: str, case: str, work: str, at_least: float) -> Target:
    rows = {"case": (case,), "provider": (batch_norm.TORCH,)}
    words = "times as fast as torch update_bn"
    return Target(device, f"update_bn, {work}", "update_bn", rows, RATIO, words, at_least=at_least)


def _cpu() -> Iterator[Target]:
    for case, plan, over_torch, over_ceiling in (
        ("resnet50", "fp32", 10, 1.15),
        ("gpt2", "fp32", 10, 1.15),
        ("gpt2", "mixed", 10, 1.6),
        ("preresnet164", "fp32", 15, 4.5),
    ):
        yield _update("cpu", (case,), plan, TORCH, RATIO, TIMES_TORCH, at_least=over_torch)
        yield _over_ceiling(case, plan, over_ceiling)
    yield _update("cpu", SMALL, "fp32", CACHED, RATIO, TIMES_CACHED, at_least=1)
    yield _update("cpu", LARGE, "fp32", CACHED, RATIO, TIMES_CACHED, at_least=1)
    yield _several("cpu", 1.2)
    yield from _reads("cpu")
    yield _batch_norm("cpu", "mlp", "MLP, batch 128", 1)
    yield _batch_norm("cpu", "preresnet164", "PreResNet-164, batch 128", 1)
    yield _batch_norm("cpu", "resnet50_batch8", "ResNet-50, batch 8", 1)
    rows = {"quantity": ("import",), "provider": ("torch",)}
    words = "times the time of `import torch`"
    yield Target("cpu", "cold import", "cold", rows, RATIO, words, at_most=1.2, inverse=True)


def _cuda() -> Iterator[Target]:
    for case, plan in (("resnet50", "fp32"), ("gpt2", "fp32"), ("gpt2", "mixed")):
        yield _update("cuda", (case,), plan, OURS, "share_of_ceiling", "of the copy's speed", at_least=0.9)
    words = f"{TIMES_TORCH}, end to end"
    yield _update("cuda", ("resnet50",), "fp32", TORCH, "wall_ratio_to_fastswa", words, at_least=20)
    yield _update("cuda", ("resnet50",), "fp32", OURS, "host_us", "us on the host", at_most=30)
    yield _update("cuda", ("preresnet164",), "fp32", OURS, "p50_us", "us on the GPU", at_most=15)
    yield _update("cuda", SMALL, "fp32", CACHED, RATIO, TIMES_CACHED, at_least=2)
    yield _update("cuda", LARGE, "fp32", CACHED, RATIO, TIMES_CACHED, at_least=1)
    yield _several("cuda", 1.25)
    words = "times as fast as timm ModelEmaV3's stochastic rounding"
    target = _update("cuda", ("resnet50", "gpt2"), "bf16_stochastic", TIMM, RATIO, words, at_least=5)
    yield replace(target, work="bfloat16 average, stochastic rounding, ResNet-50, GPT-2")
    yield from _reads("cuda")
    yield _batch_norm("cuda", "preresnet164", "PreResNet-164, batch 128", 1.5)
    yield _batch_norm("cuda", "resnet50_batch256", "ResNet-50, batch 256", 1.1)


TARGETS = (*_cpu(), *_cuda())


def judged(device: str, command: str, rows: Sequence[Row]) -> Iterator[Verdict]:
    """The targets that some rows are about.

    Args:
        device: "cpu" or "cuda".
        command: that measured the rows.
        rows: of any cases.
    """
    for target in TARGETS:
        if (target.device, target.command) == (device, command) and any(map(target.holds, rows)):
            yield judge(target, rows)
