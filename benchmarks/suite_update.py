"""The update for pytest-benchmark, whose saved runs show a change that made it slower.

    pytest benchmarks/suite_update.py --benchmark-only --benchmark-autosave --benchmark-compare

`python -m benchmarks update` is the measurement to quote: here nothing takes turns, so compare runs of a quiet machine.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.cases import CASES, Shapes
from benchmarks.providers import PLANS
from benchmarks.registry import providers_of
from benchmarks.update import GPU_ONLY, plans
from benchmarks.verify import verify

CPU = torch.device("cpu")
COMPARISONS = [
    (case, plan, provider)
    for case in CASES
    if case != GPU_ONLY
    for plan in plans(CPU, case)
    for provider in providers_of(plan)
]


@pytest.mark.parametrize(("case", "plan", "provider"), COMPARISONS, ids=lambda name: name)
def test_update(benchmark: Any, case: str, plan: str, provider: str) -> None:
    benchmark.group = f"{case} {plan}"
    model = Shapes(case, PLANS[plan].source)
    providers = {provider: providers_of(plan)[provider]}
    prepared, verdicts = verify(model, PLANS[plan], providers)
    if provider not in prepared:
        assert not providers[provider].ours, verdicts[provider]
        pytest.skip(verdicts[provider])
    benchmark(prepared[provider].update)
