"""Every provider of every plan: the one list of what is timed."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.peers import PEERS
from benchmarks.providers import CEILING, PLANS, PROVIDERS, Provider, ceiling
from benchmarks.swag_rule import SWAGS
from benchmarks.weight_averages import ROUNDED, SEVERAL


def providers_of(plan: str) -> Mapping[str, Provider]:
    """What is timed in a plan.

    Args:
        plan: a key of `PLANS`.

    Returns:
        Providers by name; the others' times are compared with the first's. The last is the ceiling.
    """
    if PLANS[plan].averages > 1:
        return SEVERAL
    if PLANS[plan].stochastic:
        return ROUNDED
    if PLANS[plan].moments:
        return SWAGS
    every = {**PROVIDERS, **PEERS}
    return {name: own for name, own in every.items() if plan in own.plans} | {CEILING: Provider(ceiling, ())}
