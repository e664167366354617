"""Averages saved and loaded: everything that a resumed run needs, and whether it is the same run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastswa.average_sets import AverageSets
from fastswa.counters import Counters
from fastswa.rules import Rule


def state_of(rules: Mapping[str, Rule], sets: AverageSets, counters: Counters, seed: int | None) -> dict[str, Any]:
    """Everything that a resumed run needs.

    Args:
        rules: by name.
        sets: of averages, those of a rule next to one another.
        counters: of the models in them.
        seed: of stochastic rounding.

    Returns:
        Tensors (the averages themselves, not copies), numbers and strings in nested dicts.
    """
    own = iter(sets.sets)
    return {
        "rules": {name: repr(rule) for name, rule in rules.items()},
        "counters": counters.state_dict(),
        "seed": seed,
        "averages": {
            name: [dict(zip(sets.averaged_names, next(own), strict=True)) for _ in range(rule.copies)]
            for name, rule in rules.items()
        },
        "copies": dict(zip(sets.copied_names, sets.copies, strict=True)),
    }


@torch.no_grad()
def load_state(own: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Write saved tensors into a run's own.

    Args:
        own: the present state, as `state_of` gives it; its tensors are written.
        saved: another state, on whatever device.

    Raises:
        ValueError: they differ in more than values; the first difference is named, and nothing was written.
    """
    different = difference(own, saved)
    if different:
        raise ValueError(f"the saved averages are others: {different}")
    for name, sets in own["averages"].items():
        for to, origin in zip(sets, saved["averages"][name], strict=True):
            torch._foreach_copy_(list(to.values()), [origin[key] for key in to])
    if own["copies"]:
        torch._foreach_copy_(list(own["copies"].values()), [saved["copies"][key] for key in own["copies"]])


def difference(own: Mapping[str, Any], saved: Mapping[str, Any]) -> str | None:
    """The first difference between two state_dicts that is no difference of values.

    Args:
        own: of the averages that are to load.
        saved: to be loaded.

    Returns:
        The difference in words, or None.

    Example:
        >>> difference({"rules": {"average": "SWA()"}}, {"rules": {"average": "EMA(decay=0.9)"}})
        "the rule of 'average' is EMA(decay=0.9) in the file and SWA() here"
    """
    missing = next((key for key in own if key not in saved), None)
    if missing is not None:
        return f"there is no {missing!r} in the file"
    for name in own["rules"].keys() | saved["rules"].keys():
        here, there = own["rules"].get(name), saved["rules"].get(name)
        if here != there:
            return f"the rule of {name!r} is {there or 'missing'} in the file and {here or 'missing'} here"
    if own.get("seed") != saved.get("seed"):
        return f"the seed of stochastic rounding is {saved['seed']} in the file and {own['seed']} here"
    for name, sets in own.get("averages", {}).items():
        for here, there in zip(sets, saved["averages"][name], strict=True):
            found = different_tensors(f"average {name!r}", here, there)
            if found:
                return found
    return different_tensors("copies", own["copies"], saved["copies"]) if "copies" in own else None


def different_tensors(what: str, own: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> str | None:
    """The first difference between two sets of named tensors that is no difference of values.

    Args:
        what: they are.
        own: that are to be written.
        saved: to be loaded.

    Returns:
        The difference in words, or None.

    Example:
        >>> different_tensors("average", {"bias": torch.zeros(2)}, {})
        "'bias' of the average is only here"
    """
    for name in (*own, *saved):
        if name not in own or name not in saved:
            return f"{name!r} of the {what} is only {'in the file' if name in saved else 'here'}"
        here, there = own[name], saved[name]
        if (here.shape, here.dtype) != (there.shape, there.dtype):
            return (
                f"{name!r} of the {what} is {there.dtype} {tuple(there.shape)} in the file "
                f"and {here.dtype} {tuple(here.shape)} here"
            )
    return None
