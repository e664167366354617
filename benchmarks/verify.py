"""The gate before every timing: an update whose result is wrong gets no time.

Between updates every weight is multiplied by -1/2, which no dtype rounds. The exact average is then one number, known
from the averaging weights alone, times the weight it started from: no history is kept, so the check reaches every
element of an 8 G model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from benchmarks.providers import Plan, Prepared, Provider

YES = "yes"
CEILING_NOTE = "averages nothing"
UPDATES = 4
FACTOR = -0.5
PIECE = 1 << 24
"""Elements compared at once, in float64."""


def tolerance(average: torch.dtype) -> float:
    """The allowed error, relative to the largest weight that an element has had.

    Args:
        average: dtype of the averages.

    Returns:
        For each update five roundings in float32 arithmetic (the averaging weight, and up to four operations in torch's
        form, on values up to twice the largest weight) and one of half an ulp at the store.
    """
    return UPDATES * (5 * torch.finfo(torch.float32).eps + torch.finfo(average).eps / 2)


def verify(
    model: nn.Module, plan: Plan, providers: Mapping[str, Provider]
) -> tuple[dict[str, Prepared], dict[str, str]]:
    """Prepare providers for a model, run a few updates of changing weights, and compare with float64.

    Args:
        model: its parameters and buffers are changed.
        plan: the dtypes.
        providers: by name.

    Returns:
        The providers that may be timed, and a verdict for each: "yes", "wrong: ..." or "skipped: ..." (a peer that
        refuses the model or its dtypes, in its own words).
    """
    prepared: dict[str, Prepared] = {}
    verdicts: dict[str, str] = {}

    def attempt(name: str, action: Callable[[], object]) -> object:
        try:
            return action()
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            verdicts[name] = f"{'wrong: raised' if providers[name].ours else 'skipped:'} {reason[:200]}"
            prepared.pop(name, None)
            return None

    for name, provider in providers.items():
        ready = attempt(name, lambda provider=provider: provider.setup(model, plan))
        if isinstance(ready, Prepared):
            prepared[name] = ready
    for update in range(UPDATES):
        if update:
            _change(model)
        for name in list(prepared):
            attempt(name, prepared[name].update)
    for name in list(prepared):
        verdicts[name] = _verdict(model, providers[name], prepared[name], plan)
        if verdicts[name] not in (YES, CEILING_NOTE):
            del prepared[name]
    return prepared, verdicts


@torch.no_grad()
def _change(model: nn.Module) -> None:
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.mul_(FACTOR)
        else:
            tensor.add_(1)


def _verdict(model: nn.Module, provider: Provider, prepared: Prepared, plan: Plan) -> str:
    if provider.weight is None or prepared.averaged is None:
        return CEILING_NOTE
    exact = 1.0
    for n in range(1, UPDATES):
        exact += provider.weight(n) * (FACTOR**n - exact)
    allowed = tolerance(plan.average)
    for (name, average), source in zip(prepared.averaged.named_parameters(), model.parameters(), strict=True):
        if average.dtype != plan.average:
            return f"wrong: {name} is {average.dtype}"
        error = _error(average.detach(), source.detach(), exact)
        # Negated, so that NaN is wrong too.
        if not error <= allowed:
            return f"wrong: {name} is off by {error:.2g} of the weight, {allowed:.2g} allowed"
    for (name, copy), source in zip(prepared.averaged.named_buffers(), model.buffers(), strict=True):
        if not torch.equal(copy, source.to(copy.dtype)):
            return f"wrong: buffer {name} differs from the model's"
    return YES


def _error(average: Tensor, source: Tensor, exact: float) -> float:
    """The largest error, in units of the weight that the element started from."""
    worst = 0.0
    for to, origin in zip(average.reshape(-1).split(PIECE), source.reshape(-1).split(PIECE), strict=True):
        start = origin.double() / FACTOR ** (UPDATES - 1)
        error = (to.double() - exact * start).abs_()
        # A weight of 0 must have an average of exactly 0, or the quotient is infinite.
        quotient = torch.where(error == 0, 0.0, error / start.abs_()).max().item()
        if not quotient <= worst:
            worst = quotient
    return worst
