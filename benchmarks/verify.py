"""The gate before every timing: an update whose result is wrong gets no time.

Between updates every weight is multiplied by -1/2, which no dtype rounds. The exact average is then one number, known
from the averaging weights alone, times the weight it started from: no history is kept, so the check reaches every
element of an 8 G model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from benchmarks.providers import COPIED, DECAY, LEFT, NO_BUFFERS, TRUNCATED, Plan, Prepared, Provider
from benchmarks.verify_rounding import Step

YES = "yes"
CEILING_NOTE = "averages nothing"
UPDATES = 4
FACTOR = -0.5
COUNTED = 1000
"""What every integer is counted up by, so that an average of integers can be told from a copy."""
PIECES = {"cpu": 1 << 16, "cuda": 1 << 24}
"""Elements compared at once, in float64: on a CPU few enough for its cache."""


def tolerance(average: torch.dtype, stochastic: bool = False, updates: int = UPDATES) -> float:
    """The allowed error, relative to the largest weight that an element has had.

    Args:
        average: dtype of the averages.
        stochastic: whether they are rounded to either neighbour.
        updates: that an average took.

    Returns:
        For each update five roundings in float32 arithmetic (the averaging weight, and up to four operations in torch's
        form, on values up to twice the largest weight) and one at the store: half an ulp, or stochastic a whole one.
    """
    store = torch.finfo(average).eps * (1.0 if stochastic else 0.5)
    return updates * (5 * torch.finfo(torch.float32).eps + store)


def verify(
    model: nn.Module, plan: Plan, providers: Mapping[str, Provider]
) -> tuple[dict[str, Prepared], dict[str, str]]:
    """Prepare providers for a model, run a few updates of changing weights, and compare with float64.

    Args:
        model: its parameters and buffers are changed.
        plan: the dtypes.
        providers: by name.

    Returns:
        The providers that may be timed, and a verdict for each: "yes", with what becomes of buffers where they are not
        copied; "wrong: ..."; "skipped: ..." of a peer that is not installed, or that refuses the model or its dtypes,
        in its own words.
    """
    prepared: dict[str, Prepared] = {}
    verdicts: dict[str, str] = {}

    def attempt(name: str, action: Callable[[], object]) -> object:
        try:
            return action()
        except Exception as error:
            verdicts[name] = refusal(error, providers[name].ours)
            prepared.pop(name, None)
            return None

    for name, provider in providers.items():
        ready = attempt(name, lambda provider=provider: provider.setup(model, plan))
        if isinstance(ready, Prepared):
            prepared[name] = ready
    steps: dict[str, Step] = {}
    for update in range(UPDATES):
        if update:
            change(model)
        for name in list(prepared):
            averages = prepared[name].averages
            if update == UPDATES - 1 and providers[name].stochastic and averages is not None:
                steps[name] = Step(averages, 1 - DECAY)
            attempt(name, prepared[name].update)
    for name in list(prepared):
        verdicts[name] = _verdict(model, providers[name], prepared[name], plan)
        if verdicts[name] == YES and name in steps:
            verdicts[name] = steps[name].fault(model) or YES
        if not right(verdicts[name]):
            del prepared[name]
    return prepared, verdicts


def right(verdict: str) -> bool:
    """Whether what it is of may be timed.

    Args:
        verdict: as `verify` gives it.
    """
    return verdict == CEILING_NOTE or verdict.split(",")[0] == YES


def refusal(error: Exception, ours: bool) -> str:
    """The verdict on a provider that raised.

    Args:
        error: that it raised.
        ours: whether it is fastswa.
    """
    if isinstance(error, ModuleNotFoundError) and error.name and not ours:
        return f"skipped: {error.name.split('.')[0]} is not installed"
    words = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return f"wrong: raised {words}" if ours else f"skipped: {words}"


@torch.no_grad()
def change(model: nn.Module) -> None:
    """Multiply every weight by `FACTOR`, and count up every integer by `COUNTED`.

    Args:
        model: to be changed.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.mul_(FACTOR)
        else:
            tensor.add_(COUNTED)


def _verdict(model: nn.Module, provider: Provider, prepared: Prepared, plan: Plan) -> str:
    if prepared.averages is None:
        return CEILING_NOTE
    models = (*[1.0] * provider.before, *(FACTOR**n for n in range(UPDATES)))
    for index, average in enumerate(prepared.averages()):
        fault = _fault(model, average, provider, provider.exact[index](models), plan)
        if fault:
            return f"wrong: {fault}" + (f", in average {index + 1}" if len(provider.exact) > 1 else "")
    return YES if provider.buffers == COPIED else f"{YES}, {provider.buffers}"


def _fault(
    model: nn.Module, averages: Mapping[str, Tensor], provider: Provider, exact: float, plan: Plan
) -> str | None:
    allowed = tolerance(plan.average, provider.stochastic, provider.before + UPDATES)
    compared = dict(model.named_parameters())
    for name, source in model.named_buffers():
        if provider.buffers == NO_BUFFERS:
            continue
        if name not in averages:
            return f"{name} has no average"
        if provider.buffers != COPIED and source.is_floating_point():
            compared[name] = source
        elif provider.buffers in (LEFT, TRUNCATED) and not source.is_floating_point():
            fault = _integer_fault(averages[name], source, provider)
            if fault:
                return f"buffer {name} {fault}"
        elif not torch.equal(averages[name], source.to(averages[name].dtype)):
            return f"buffer {name} differs from the model's"
    for name, source in compared.items():
        average = averages[name].detach()
        if average.dtype != plan.average:
            return f"{name} is {average.dtype}"
        if not _all_near(average, source.detach(), exact, allowed):
            error = _error(average, source.detach(), exact)
            return f"{name} is off by {error:.2g} of the weight, {allowed:.2g} allowed"
    return None


def _integer_fault(average: Tensor, source: Tensor, provider: Provider) -> str | None:
    start = source - COUNTED * (UPDATES - 1)
    if provider.buffers == LEFT:
        return None if torch.equal(average, start) else f"is {average.tolist()}, {start.tolist()} at the start"
    exact = start + provider.exact[0]([COUNTED * n for n in range(UPDATES)])
    # Each update cuts off less than one, of which the next ones keep a part.
    if not bool(((average <= exact + 1) & (average > exact - UPDATES)).all()):
        return f"is {average.tolist()}, {exact.tolist()} before anything is cut off"
    return None


def _all_near(average: Tensor, source: Tensor, exact: float, allowed: float) -> bool:
    """Whether no error is larger than allowed, in units of the weight that the element started from."""
    unit = FACTOR ** (UPDATES - 1)
    for to, origin in _pieces(average, source):
        error = to.double().sub_(origin.double(), alpha=exact / unit).abs_()
        # Negated, so that NaN is wrong too.
        if not error.sub_(origin.double().abs_(), alpha=allowed / abs(unit)).max().item() <= 0:
            return False
    return True


def _error(average: Tensor, source: Tensor, exact: float) -> float:
    """The largest error, in units of the weight that the element started from."""
    worst = 0.0
    for to, origin in _pieces(average, source):
        start = origin.double() / FACTOR ** (UPDATES - 1)
        error = (to.double() - exact * start).abs_()
        # A weight of 0 must have an average of exactly 0, or the quotient is infinite.
        quotient = torch.where(error == 0, 0.0, error / start.abs_()).max().item()
        if not quotient <= worst:
            worst = quotient
    return worst


def _pieces(average: Tensor, source: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    size = PIECES[source.device.type]
    return zip(average.reshape(-1).split(size), source.reshape(-1).split(size), strict=True)
