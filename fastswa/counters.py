"""How many models each average has taken, counted on the host or, where the host may not know, on the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastswa.rules import Rule
from fastswa.updates import MultiUpdate, Random


def check_rules(rules: Mapping[str, object]) -> None:
    """Refuse what are no rules.

    Args:
        rules: by name.

    Raises:
        ValueError: none.
        TypeError: something else than a rule; names it.
    """
    if not rules:
        raise ValueError("rules must hold at least one rule")
    for name, rule in rules.items():
        if not isinstance(rule, Rule):
            raise TypeError(f"the rule of {name!r} must be a Rule such as EMA(0.999), got {type(rule).__name__}")


class Counters:
    """Counts update calls and the models that each rule took, and turns them into weights.

    On the device it counts when asked to from the start (for CUDA graphs), or from the first update on whose skip flag
    is on a GPU: whether that update happened, only the GPU knows.

    Args:
        rules: by name; each has as many sets of averages as copies, in this order.
        device: of the averages.
        on_device: whether to count there from the start.
    """

    def __init__(self, rules: Mapping[str, Rule], device: torch.device, on_device: bool) -> None:
        self._rules = rules
        self._device = device
        self._step = 0
        self._n = {name: int(rule.include_start) for name, rule in rules.items()}
        self._there: Tensor | None = None
        if on_device:
            self._start_there()

    def _start_there(self) -> Tensor:
        self._there = torch.tensor([self._step, *self._n.values()], dtype=torch.int64, device=self._device)
        return self._there

    def move(self, device: torch.device) -> None:
        """Go on with averages that are on another device.

        Args:
            device: of the averages.
        """
        self._device = device
        if self._there is not None:
            self._there = self._there.to(device)

    @torch.no_grad()
    def update(self, update: MultiUpdate, seed: int | None, skip: Tensor | None) -> None:
        """Run an update with the weights that are due, and count it.

        Args:
            update: of the averages, prepared.
            seed: of stochastic rounding; None to round to nearest.
            skip: not zero makes all of it do nothing.
        """
        if self._there is None and skip is not None and not skip.is_cuda:
            if bool(skip):
                return
            skip = None
        if self._there is None and skip is None:
            self._update_from_host(update, seed)
        else:
            self._update_on_device(update, seed, skip)

    def _update_from_host(self, update: MultiUpdate, seed: int | None) -> None:
        due = [name for name, rule in self._rules.items() if rule.due(self._step)]
        if due:
            weights = [
                weight
                for name, rule in self._rules.items()
                for weight in (rule.copy_weights(self._n[name]) if name in due else (0.0,) * rule.copies)
            ]
            update.lerp_(weights, _random(seed, self._step), None)
        self._step += 1
        for name in due:
            self._n[name] += 1

    def _update_on_device(self, update: MultiUpdate, seed: int | None, skip: Tensor | None) -> None:
        counters = self._start_there() if self._there is None else self._there
        step, *counted = counters.unbind()
        due = [rule.due(step) for rule in self._rules.values()]
        weights = [
            torch.where(here, torch.as_tensor(weight, dtype=torch.float64, device=self._device), 0.0)
            for rule, n, here in zip(self._rules.values(), counted, due, strict=True)
            for weight in rule.copy_weights(n)
        ]
        nothing = torch.zeros((), dtype=torch.bool, device=self._device) if skip is None else skip.reshape(()) != 0
        # Where no rule is due nothing is copied either, as when the host counts.
        update.lerp_(torch.stack(weights), _random(seed, step), nothing | ~torch.stack(due).any())
        counters += torch.stack([torch.ones_like(nothing), *due]) & ~nothing

    def find(self, name: str | None) -> tuple[slice, tuple[float, ...]]:
        """An average's sets, and the coefficients by which they are combined.

        Args:
            name: of the average; may be None where there is one.

        Raises:
            KeyError: no average of that name.
            RuntimeError: it holds no model yet.
        """
        names = list(self._rules)
        name = names[0] if name is None and len(names) == 1 else name
        if name is None or name not in names:
            raise KeyError(f"no average is called {name!r}; there are {', '.join(map(repr, names))}")
        n = self.n_averaged()[name]
        if n == 0:
            raise RuntimeError(f"the average {name!r} holds no model yet; call update() first")
        first = sum(self._rules[other].copies for other in names[: names.index(name)])
        return slice(first, first + self._rules[name].copies), self._rules[name].mixture(n)

    def n_averaged(self) -> dict[str, int]:
        """The models that each average holds. Waits for the device where they are counted there."""
        return self._n if self._there is None else dict(zip(self._n, self._there.tolist()[1:], strict=True))

    def state_dict(self) -> dict[str, Any]:
        """The counts, as plain numbers."""
        step = self._step if self._there is None else int(self._there[0])
        return {"step": step, "n_averaged": dict(self.n_averaged())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from saved counts.

        Args:
            state: as `state_dict` gave it.
        """
        self._step = int(state["step"])
        self._n = {name: int(state["n_averaged"][name]) for name in self._rules}
        if self._there is not None:
            self._there.copy_(torch.tensor([self._step, *self._n.values()]))


def _random(seed: int | None, step: int | Tensor) -> Random:
    return None if seed is None else (seed, step)
