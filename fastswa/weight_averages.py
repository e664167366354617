"""WeightAverages: one or many averages of a model's weights, without a copy of the module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastswa.agreement import CheckRanks, agreeing, ranks_to_ask
from fastswa.average_state import described, load_state, refuse_state, state_of, weights_of
from fastswa.averaging import Averaging
from fastswa.counters import check_rules
from fastswa.followed import Model, Patterns, Selection, counterparts, tensors_of
from fastswa.rules import Rule
from fastswa.swap import swapped_in

ONLY = "average"
"""The name of the average where one rule is given."""


class WeightAverages:
    r"""Averages of a model's weights, all updated together in one launch that reads each weight once.

    .. math:: a_k \leftarrow a_k + w_k(n_k) (p - a_k)

    with the weights of the rules. The first model that a rule takes is copied. Only the tensors are kept, not a copy of
    the module: models that can't be deep-copied are fine, and parts can be left out. Of a DTensor (FSDP2, tensor
    parallelism) each rank averages its own part, and no update asks another rank.

    Args:
        model: a module, a mapping name -> tensor, or pairs (name, tensor). Tied tensors are averaged once.
        rules: a rule, whose average is called "average", or a mapping name -> rule.
        dtype: of the averages, float32 whatever the model's; None for the model's own. Complex tensors keep theirs.
        device: of the averages; the model's own if left out. "cpu" for a model on a GPU: the weights go to pinned
            memory in one transfer a dtype, and a thread averages them there; its errors are raised at the next call.
        include: names to follow: a pattern as in a shell ("encoder.*"), several, or a function of the name.
        exclude: names not to follow, likewise.
        trainable_only: leave out parameters that need no gradient.
        buffers: "copy" keeps the model's latest, "average" averages floating ones and copies integers, "ignore".
        rounding: of bfloat16 and float16 averages: "nearest", in which small steps are lost, or "stochastic", which is
            right on average.
        seed: of stochastic rounding. The bits depend on (seed, step, element), so ranks and resumed runs agree.
        overlap: update on a side stream, so that it hides under the next forward and backward pass. The next
            `optimizer.step()` and everything that reads the averages wait for it, on the device. Where something else
            writes the weights, call `wait` first.
        capturable: count on the device, so that a CUDA graph can hold `update`.
        backend: "auto" (Triton on a GPU, else torch), "triton" or "torch".
        check_ranks: compare rules, names and shapes over the ranks, here and at `load_state_dict`, so that all fail
            together: over those that share DTensors (left out), over a ProcessGroup or all (True), or never (False).

    Raises:
        ValueError: no rules, an unknown option, nothing to average, a tensor without values, ranks that differ; names
            it.
        TypeError: a rule that is none; a tensor that can't be averaged; names it.
        RuntimeError: a backend that can't run here.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> averages = WeightAverages(model, {"fast": EMA(0.99), "slow": EMA(0.9999)})
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> for _ in range(3):
        ...     model(torch.randn(8, 4)).square().mean().backward()
        ...     optimizer.step()
        ...     averages.update()
        >>> with averages.swapped("slow"):
        ...     prediction = model(torch.randn(8, 4))
        >>> averages.n_averaged
        {'fast': 3, 'slow': 3}

    References:
        Izmailov et al. 2018, Averaging Weights Leads to Wider Optima and Better Generalization, Algorithm 1.
    """

    def __init__(
        self,
        model: Model,
        rules: Rule | Mapping[str, Rule],
        *,
        dtype: torch.dtype | None = torch.float32,
        device: int | torch.device | str | None = None,
        include: Patterns = None,
        exclude: Patterns = None,
        trainable_only: bool = False,
        buffers: str = "copy",
        rounding: str = "nearest",
        seed: int = 0,
        overlap: bool = False,
        capturable: bool = False,
        backend: str = "auto",
        check_ranks: CheckRanks = None,
    ) -> None:
        model = model if isinstance(model, nn.Module | Mapping) else dict(model)
        self._check_ranks = check_ranks
        self._swapped: str | None = None
        with agreeing(ranks_to_ask(check_ranks, tensors_of(model)), "WeightAverages", self._facts):
            self.rules = {ONLY: rules} if isinstance(rules, Rule) else dict(rules)
            """The rule of each average."""
            check_rules(self.rules)
            if rounding not in ("nearest", "stochastic"):
                raise ValueError(f"rounding must be 'nearest' or 'stochastic', got {rounding!r}")
            self._averaging = Averaging(
                Selection(model, include, exclude, trainable_only, buffers),
                self.rules,
                dtype,
                None if device is None else torch.device(device),
                seed if rounding == "stochastic" else None,
                overlap,
                capturable,
                backend,
            )

    def update(self, skip: Tensor | None = None) -> None:
        """Take the model's present weights into the averages that are due; call it after `optimizer.step()`.

        Args:
            skip: a tensor of one element, on the averages' device (a GradScaler's found_inf, a check for NaN): where it
                is not zero, nothing happens and nothing is counted. On a GPU the host does not read it, and from then
                on the models are counted there. To be equal on ranks that share DTensors.

        Raises:
            RuntimeError: inside `swapped`; in a capture, when the update was not prepared before it; where FSDP2 holds
                whole parameters, between a forward and a backward pass.
            ValueError: tensors that appeared, disappeared or changed their shape; the first is named, and nothing has
                been written. `refresh` accepts them.
        """
        self._refuse_swapped("update")
        self._averaging.update(skip)

    def wait(self) -> None:
        """Make what follows see all updates; needed with `overlap` only, where something else writes the weights."""
        self._averaging.wait()

    @property
    def n_averaged(self) -> dict[str, int]:
        """How many models each average holds. Waits for the device where the models are counted there."""
        self.wait()
        return self._averaging.counters.n_averaged()

    @contextmanager
    def swapped(self, name: str | None = None) -> Iterator[None]:
        """A context in which the model holds an average; afterwards it holds its own weights and buffers, bit for bit.

        The tensors stay where they are, so optimizers, compiled graphs and DistributedDataParallel keep theirs. An
        average of the model's dtype changes places with the weights, without memory for a third copy; what the body
        writes into the weights then stays in the average. Buffers may be written freely, as by `update_bn`.

        Args:
            name: of the average; may be left out where there is one.

        Raises:
            RuntimeError: inside another `swapped`; before the first update; where FSDP2 holds whole parameters.
            KeyError: no average of that name.
        """
        self._settle("swapped")
        values = self._averaging.values(name)
        self._averaging.catch_up()
        exchange = len(self._averaging.counters.find(name)[1]) == 1
        with swapped_in(self._averaging.selection, values, exchange):
            self._swapped = name or next(iter(self.rules))
            try:
                yield
            finally:
                self._swapped = None

    @torch.no_grad()
    def copy_to(self, model: nn.Module | None = None, name: str | None = None) -> None:
        """Write an average, and the copied buffers, into a model.

        Args:
            model: with tensors of the same names and shapes; the one that is followed if left out.
            name: of the average; may be left out where there is one.

        Raises:
            RuntimeError: inside `swapped`; before the first update.
            ValueError: a tensor that the model has not or has in another shape; nothing has been written.
            KeyError: no average of that name.
        """
        self._settle("copy_to")
        values = self._averaging.values(name)
        if model is None:
            self._averaging.catch_up()
        selection = self._averaging.selection
        targets = selection.tensors if model is None else counterparts(model, selection.followed)
        torch._foreach_copy_(targets, values)

    @torch.no_grad()
    def weights(self, name: str | None = None, *, full: bool = False) -> dict[str, Tensor]:
        """An average by canonical names, tied names included, with the copied buffers that a state_dict holds.

        Args:
            name: of the average; may be left out where there is one.
            full: gather DTensors, one after another, on the CPU of the first rank of their mesh, for export. All ranks
                must call it; the others get nothing.

        Returns:
            Tensors of their own, for `model.load_state_dict` or safetensors; averages in the averages' dtype.

        Raises:
            RuntimeError: inside `swapped`; before the first update.
            KeyError: no average of that name.
        """
        self._settle("weights")
        return weights_of(self._averaging.selection.followed, self._averaging.values(name), full)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs: averages, counters, the rules' descriptions, the seed.

        Returns:
            Tensors (the averages themselves, not copies), numbers and strings in nested dicts. Where the model has
            DTensors they are DTensors placed alike, which torch.distributed.checkpoint saves, and loads in place.

        Raises:
            RuntimeError: inside `swapped`.
        """
        self._settle("state_dict")
        return state_of(self.rules, self._averaging)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another run was saved.

        Args:
            state: as `state_dict` gave it, on whatever device; whole tensors too where the model has DTensors.
                torch.distributed.checkpoint has written its tensors in place before it calls this.

        Raises:
            ValueError: another rule, seed, name, shape, dtype or placement, or ranks that differ; the first difference
                is named, and nothing was loaded.
            RuntimeError: inside `swapped`; another rank failed.
        """
        asked = ranks_to_ask(self._check_ranks, [each.tensor for each in self._averaging.selection.followed])
        with agreeing(asked, "load_state_dict", lambda: {**self._facts(), "the count": state["counters"]}):
            self._settle("load_state_dict")
            refuse_state(self.state_dict(), state)
        load_state(self.state_dict(), state)
        self._averaging.counters.load_state_dict(state["counters"])

    def refresh(self) -> None:
        """Accept that tensors of the model appeared, disappeared or changed their shape.

        Where a tensor has the name and shape of before, its averages go on. Others begin as the model's present values.
        """
        self._settle("refresh")
        self._averaging.selection.refresh()
        self._averaging.take_over()

    def add(self, tensors: Mapping[str, Tensor] | Sequence[tuple[str, Tensor]]) -> None:
        """Follow further tensors. Their averages begin as their present values.

        Args:
            tensors: a mapping or pairs, of names that are not followed yet.

        Raises:
            ValueError: a name that is followed already.
        """
        self._settle("add")
        self._averaging.selection.add(tensors)
        self._averaging.take_over()

    def _facts(self) -> dict[str, Any]:
        return described(self.rules, self._averaging)

    def _settle(self, what: str) -> None:
        self._refuse_swapped(what)
        self.wait()

    def _refuse_swapped(self, what: str) -> None:
        if self._swapped is not None:
            raise RuntimeError(f"{what}: the model holds the average {self._swapped!r}; leave swapped() first")

    def __getstate__(self) -> dict[str, Any]:
        # A group of processes means nothing in another process.
        asked = self._check_ranks if isinstance(self._check_ranks, bool) else None
        return {**self.__dict__, "_check_ranks": asked}
