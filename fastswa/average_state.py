"""Averages saved and loaded: everything that a resumed run needs, and whether it is the same run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastswa import shards
from fastswa.averaging import Averaging
from fastswa.followed import Followed
from fastswa.rules import Rule


def state_of(rules: Mapping[str, Rule], averaging: Averaging) -> dict[str, Any]:
    """Everything that a resumed run needs.

    Args:
        rules: by name.
        averaging: the averages by these rules.

    Returns:
        Tensors (the averages themselves, not copies), numbers and strings in nested dicts. Averages of DTensors are
        DTensors placed alike.
    """
    tensors = {each.name: each.tensor for each in averaging.selection.followed}
    own = ({name: shards.placed(part, tensors[name]) for name, part in named.items()} for named in averaging.sets.named)
    return {
        "rules": {name: repr(rule) for name, rule in rules.items()},
        "counters": averaging.counters.state_dict(),
        "seed": averaging.seed,
        "averages": {name: [next(own) for _ in range(rule.copies)] for name, rule in rules.items()},
        "copies": next(own),
    }


def described(rules: Mapping[str, Rule], averaging: Averaging) -> dict[str, Any]:
    """What ranks that average together must have in common, in words.

    Args:
        rules: by name.
        averaging: the averages by these rules.
    """
    kinds = averaging.sets.sets[0][0].dtype, averaging.seed
    tensors = {
        repr(each.name): f"{'averaged' if each.averaged else 'copied'} {each.tensor.dtype} {tuple(each.tensor.shape)}"
        for each in averaging.selection.followed
    }
    rules = {f"the rule of {name!r}": rule for name, rule in rules.items()}
    return {**rules, "dtype and seed of the averages": kinds, **tensors}


def weights_of(followed: Sequence[Followed], values: Sequence[Tensor], full: bool) -> dict[str, Tensor]:
    """An average by all its names, for a state_dict of the model.

    Args:
        followed: the model's tensors.
        values: what this rank holds of the average, one for each of them.
        full: gather DTensors on the CPU of the first rank; all ranks take part, the others get nothing.

    Returns:
        Tensors of their own.
    """
    first = not full or shards.is_first(each.tensor for each in followed)
    found: dict[str, Tensor] = {}
    for each, value in zip(followed, values, strict=True):
        if not each.saved:
            continue
        whole = shards.gathered(shards.placed(value, each.tensor)) if full else value
        for name in each.names if first else ():
            found[name] = whole.to("cpu", copy=True) if full else shards.placed(whole.clone(), each.tensor)
        # Not beside the next one, while that is gathered.
        del whole
    return found


def refuse_state(own: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Refuse a state of something else.

    Args:
        own: the present state, as `state_of` gives it.
        saved: another state, on whatever device.

    Raises:
        ValueError: they differ in more than values; the first difference is named.
    """
    different = difference(own, saved)
    if different:
        raise ValueError(f"the saved averages are others: {different}")


@torch.no_grad()
def load_state(own: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Write saved tensors into a run's own.

    Args:
        own: the present state, as `state_of` gives it; its tensors are written.
        saved: another state that was not refused, on whatever device.
    """
    for name, sets in own["averages"].items():
        for to, origin in zip(sets, saved["averages"][name], strict=True):
            _copy(to, origin)
    _copy(own["copies"], saved["copies"])


def _copy(to: Mapping[str, Tensor], origin: Mapping[str, Tensor]) -> None:
    if to:
        parts = [shards.cut(origin[name], tensor) for name, tensor in to.items()]
        torch._foreach_copy_(list(map(shards.local, to.values())), parts)


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
        # A whole tensor in the file is cut.
        if shards.is_sharded(there) and shards.layout(here) != shards.layout(there):
            return (
                f"{name!r} of the {what} is sharded otherwise in the file than here; "
                "torch.distributed.checkpoint can load it, or weights(full=True) give it whole"
            )
    return None
