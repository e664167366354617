"""Whether fastswa's stand-in averages as the original does: the gate before every timing."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module

import torch
from torch import Tensor

from benchmarks import torchvision_operators
from benchmarks.cases import Shapes
from benchmarks.providers import Prepared
from benchmarks.verify import UPDATES, YES, change, tolerance

ORIGINAL, OURS = "original", "fastswa"
IMPLEMENTATIONS = {ORIGINAL: "original", OURS: "ours"}
"""The functions of a library's file."""
ALLOWED = 2 * tolerance(torch.float32)
"""Difference of the two averages, relative to the largest weight: each errs by `tolerance`."""


def prepare(library: str, implementation: str, model: Shapes) -> Prepared:
    """Make one of the two averages of a model.

    Args:
        library: a file of this folder.
        implementation: a key of `IMPLEMENTATIONS`.
        model: to be averaged.
    """
    torchvision_operators.declare()
    module = import_module(f"benchmarks.integrations.{library}")
    prepared: Prepared = getattr(module, IMPLEMENTATIONS[implementation])(model)
    return prepared


def check_pair(library: str, case: str, device: torch.device) -> dict[str, str]:
    """Run both on changing weights, and compare what they averaged.

    Args:
        library: a file of this folder.
        case: a key of `cases.CASES`.
        device: where the model is.

    Returns:
        A verdict for each: "yes", "wrong: ..." of fastswa's, "skipped: ..." where the original raised something.
    """
    torch.manual_seed(0)
    model = Shapes(case, device=device)
    tensors = {name: tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    starts = {name: tensor.clone() for name, tensor in tensors.items()}
    verdicts = dict.fromkeys(IMPLEMENTATIONS, YES)
    averages: dict[str, Mapping[str, Tensor]] = {}
    for implementation in IMPLEMENTATIONS:
        for name, tensor in tensors.items():
            tensor.copy_(starts[name])
        try:
            prepared = prepare(library, implementation, model)
            for update in range(UPDATES):
                if update:
                    change(model)
                prepared.update()
            assert prepared.averages is not None
            (averages[implementation],) = prepared.averages()
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            verdicts[implementation] = f"{'skipped:' if implementation == ORIGINAL else 'wrong: raised'} {reason}"
    if verdicts[ORIGINAL] == verdicts[OURS] == YES:
        parameters = dict(model.named_parameters())
        for name, start in starts.items():
            pair = (averages[implementation].get(name) for implementation in IMPLEMENTATIONS)
            fault = _fault(name, start, tensors[name], *pair, parameter=name in parameters)
            if fault:
                verdicts[OURS] = f"wrong: {fault}"
                break
    return verdicts


def _fault(
    name: str, start: Tensor, present: Tensor, original: Tensor | None, ours: Tensor | None, parameter: bool
) -> str | None:
    if original is None and not parameter:
        return None
    if original is None or ours is None:
        return f"{name} has no average"
    if not start.is_floating_point():
        # Where the original truncates averages of integers, fastswa copies.
        copied = any(torch.equal(ours, expected.to(ours.dtype)) for expected in (present, original))
        return None if copied else f"{name} is {ours.tolist()}"
    error, scale = (ours.detach().double() - original.detach().double()).abs().max().item(), start.abs().max().item()
    # Negated, so that NaN is wrong too.
    if not error <= ALLOWED * scale:
        return f"{name} is off by {error / scale:.2g} of the largest weight, {ALLOWED:.2g} allowed"
    if parameter and any(torch.equal(ours, unmoved) for unmoved in (start, present)):
        return f"{name} was not averaged"
    return None
