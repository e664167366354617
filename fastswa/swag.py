"""SWAG: a Gaussian over a model's weights, from the models that its training passes through."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastswa import backends
from fastswa.execution import Average, Execution, execution
from fastswa.followed import Followed, Model, Patterns, Selection, counterparts
from fastswa.rules import SWA, check_integer
from fastswa.swag_state import MomentRows, real
from fastswa.swap import restored


class SWAG:
    r"""A Gaussian with the mean of a training's models and a covariance of low rank plus diagonal.

    .. math:: \theta \sim \mathcal N\left(\bar\theta,\; \tfrac 1 2 \left(\operatorname{diag}(\sigma^2) +
        \tfrac{1}{K - 1} D D^\top\right)\right)

    over n models, with their mean :math:`\bar\theta` and variance :math:`\sigma^2` (divided by n), and in the K columns
    of D the last deviations :math:`\theta_i - \bar\theta_i`, each from the mean that already holds its model. The first
    one is therefore 0; the authors' code counts it among the K too. :math:`D D^\top` is never formed.

    Kept is a running variance, not the paper's mean of squares: the same bytes, but a mean of squares minus the squared
    mean loses, in float32, all variances below 1e-7 of the squared mean.

    Only floating parameters are followed, as by the authors. Buffers are left alone: where there is BatchNorm, let
    `update_bn` recompute its statistics for each sample.

    Args:
        model: a module, a mapping name -> tensor, or pairs (name, tensor). Tied tensors are sampled once.
        rank: the most deviations kept, at least 0: that many copies of the weights, besides mean and variance.
        every: from `start` on, one call of `collect` in so many takes the model; at least 1.
        start: the first call of `collect`, counted from 0, that takes the model.
        device: of all that is kept; the model's own if left out. "cpu" for a model on a GPU: the weights go to pinned
            memory in one transfer a dtype, and a thread takes them in; its errors are raised at the next call.
        dtype: of all that is kept, float32 or float64, whatever the model's.
        include: names to follow: a pattern as in a shell ("encoder.*"), several, or a function of the name.
        exclude: names not to follow, likewise.
        trainable_only: leave out parameters that need no gradient, which cost memory and are constant.
        backend: "auto" (Triton on a GPU, else torch), "triton" or "torch".

    Raises:
        ValueError: an option out of its range; nothing to follow; a tensor without values; names it.
        TypeError: a tensor that can't be followed; names it.
        RuntimeError: a backend that can't run here.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 3))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> swag = SWAG(model, rank=5)
        >>> for _ in range(10):
        ...     torch.nn.functional.cross_entropy(model(torch.randn(16, 4)), torch.randint(3, (16,))).backward()
        ...     optimizer.step()
        ...     swag.collect()
        >>> with swag.sampled(generator=torch.Generator().manual_seed(0)):
        ...     report = update_bn([torch.randn(16, 4) for _ in range(5)], model)
        ...     prediction = model.eval()(torch.randn(2, 4)).softmax(1)
        >>> swag.n_averaged, swag.columns
        (10, 5)

    References:
        Maddox et al. 2019, A Simple Baseline for Bayesian Uncertainty in Deep Learning, Algorithm 1 and equation 1.
    """

    def __init__(
        self,
        model: Model,
        rank: int = 20,
        every: int = 1,
        start: int = 0,
        device: int | torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        *,
        include: Patterns = None,
        exclude: Patterns = None,
        trainable_only: bool = False,
        backend: str = "auto",
    ) -> None:
        check_integer("rank", rank, 0)
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"dtype must be torch.float32 or torch.float64, in which a mean goes on moving, got {dtype}"
            )
        self.rank = rank
        self._rule = SWA(start=start, every=every)
        self._settings = {"rank": rank, "start": start, "every": every}
        self._selection = Selection(model, include, exclude, trainable_only, "ignore")
        self.module: nn.Module | None = self._selection.module
        """The module, if it is one that is followed."""
        self._dtype = dtype
        self._device = None if device is None else torch.device(device)
        self._backend = backend
        self._calls = self._n = 0
        self._sampled = False
        self._execution: Execution | None = None
        for place in {each.tensor.device for each in self._followed} if self._device is None else {self._device}:
            backends.choose(backend, place)
        self._rows = self._new_rows()

    def collect(self) -> None:
        """Take the model's present weights in, if this call is due; after `optimizer.step()`, or once an epoch.

        Raises:
            RuntimeError: inside `sampled`.
            ValueError: tensors that appeared, disappeared or changed their shape; names the first; nothing is counted.
        """
        if self._sampled:
            raise RuntimeError("collect: the model holds a sample; leave sampled() first")
        if self._rule.due(self._calls):
            self._prepared().update(None)
        self._calls += 1

    @property
    def n_averaged(self) -> int:
        """How many models were taken."""
        self._wait()
        return self._n

    @property
    def columns(self) -> int:
        """How many deviations are held: K, at most the rank."""
        return min(self.n_averaged, self.rank)

    def refusal(self, diagonal_only: bool = False) -> str | None:
        """Why there is nothing to sample from, in words; None if there is.

        Args:
            diagonal_only: as `sample_` takes it.
        """
        if self.n_averaged < 2:
            return f"two models at least have a spread, and {self._n} were collected; call collect() first"
        if not diagonal_only and self.rank < 2:
            return (
                f"D z / sqrt(2 (K - 1)) needs K >= 2 deviations, and rank={self.rank} keeps {self.columns}; "
                "make the SWAG with a higher rank, or pass diagonal_only=True"
            )
        return None

    @torch.no_grad()
    def sample_(
        self,
        model: nn.Module | None = None,
        scale: float = 1.0,
        diagonal_only: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        r"""Write a sample of the weights into a model.

        .. math:: \theta = \bar\theta + \sqrt s \left(\tfrac{1}{\sqrt 2} \sigma z_1 + \tfrac{1}{\sqrt{2 (K - 1)}} D z_2
            \right) \quad\text{or}\quad \theta = \bar\theta + \sqrt s\, \sigma z_1

        Buffers stay as they are, so `update_bn` comes next where there is BatchNorm. Equal states of the generator give
        the same sample on every device, up to the last bits.

        Args:
            model: with tensors of the same names and shapes; the one that is followed if left out.
            scale: s, by which the covariance is multiplied, at least 0.
            diagonal_only: the second formula, the paper's SWAG-Diagonal. Its covariance has no factor 1/2.
            generator: on the CPU, for both normal vectors; torch's default one if left out.

        Raises:
            RuntimeError: fewer than two models collected, or than two deviations kept.
            ValueError: a scale that is negative or not finite; a tensor that the model has not, or in another shape.
        """
        reason = self.refusal(diagonal_only)
        if reason is not None:
            raise RuntimeError(f"sample_: {reason}")
        if not 0.0 <= scale < math.inf:
            raise ValueError(f"scale must be at least 0 and finite, got {scale}")
        targets = self._targets(model)
        # z_1 is a function of this seed and an element's number, so that no device needs a stream of random numbers.
        seed = int(torch.randint(2**63 - 1, (), generator=generator))
        diagonal, coefficients = math.sqrt(scale), []
        if not diagonal_only:
            diagonal /= math.sqrt(2)
            column = diagonal / math.sqrt(self.columns - 1)
            coefficients = (column * torch.randn(self.columns, generator=generator, dtype=torch.float64)).tolist()
        self._rows.sample_(targets, coefficients, diagonal, seed, self._backend)

    @torch.no_grad()
    def mean_(self, model: nn.Module | None = None) -> None:
        """Write the mean of the models, their SWA, into a model. Buffers stay as they are.

        Args:
            model: with tensors of the same names and shapes; the one that is followed if left out.

        Raises:
            RuntimeError: no models collected.
            ValueError: a tensor that the model has not, or in another shape.
        """
        if self.n_averaged == 0:
            raise RuntimeError("mean_: no model was collected; call collect() first")
        self._rows.mean_(self._targets(model))

    @contextmanager
    def sampled(
        self, scale: float = 1.0, diagonal_only: bool = False, generator: torch.Generator | None = None
    ) -> Iterator[None]:
        """A context in which the model holds a sample; afterwards it holds its own weights and buffers, bit for bit.

        Within, `update_bn` may write buffers, and `sample_` and `mean_` other weights.

        Args:
            scale: as `sample_` takes it, like the others; 0 for the mean.
            diagonal_only: the paper's SWAG-Diagonal.
            generator: on the CPU.

        Raises:
            RuntimeError: inside another `sampled`; as `sample_` raises.
        """
        if self._sampled:
            raise RuntimeError("sampled: the model holds a sample already; write another one by sample_()")
        buffers = () if self.module is None else self.module.buffers()
        with restored([*self._targets(None), *buffers]):
            self._sampled = True
            try:
                self.sample_(None, scale, diagonal_only, generator)
                yield
            finally:
                self._sampled = False

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs.

        Returns:
            "mean" and "variance" by name, "deviations" as a list in the ring's order, each by name (the tensors
            themselves; complex ones as pairs of reals), "calls", "n_averaged", "rank", "start" and "every".
        """
        self._wait()
        return {**self._settings, "calls": self._calls, "n_averaged": self._n, **self._rows.named(self.columns)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another run was saved.

        Args:
            state: as `state_dict` gave it, on whatever device.

        Raises:
            ValueError: another rank, start, every, name, shape or dtype; names the first; nothing was loaded.
        """
        self._wait()
        self._calls, self._n = self._rows.load(self._settings, state)

    def _wait(self) -> None:
        if self._execution is not None:
            self._execution.wait()

    @property
    def _followed(self) -> list[Followed]:
        return [each for each in self._selection.followed if each.averaged]

    def _new_rows(self) -> MomentRows:
        return MomentRows(self._followed, self.rank, self._dtype, self._device)

    def _prepared(self) -> Execution:
        if self._execution is None or not self._selection.unchanged():
            self._selection_is_current()
            self._execution = execution(self._followed, self._device, False, self._taking_from)
        return self._execution

    def _taking_from(self, sources: Sequence[Tensor]) -> Average:
        moments = self._rows.update_from(sources, self._backend)

        def take(_: Tensor | None) -> None:
            (weight,) = self._rule.copy_weights(self._n)
            moments.update_(weight, self._n % self.rank if self.rank else None)
            self._n += 1

        return take

    def _selection_is_current(self) -> None:
        if self._selection.unchanged():
            return
        self._selection.look("make a new SWAG")
        self._wait()
        self._execution = None
        if self._device is None and self._rows.devices != [each.tensor.device for each in self._followed]:
            before, self._rows = self._rows, self._new_rows()
            self._rows.take(before)

    def _targets(self, model: Model | None) -> list[Tensor]:
        if model is None:
            self._selection_is_current()
            tensors = [each.tensor.detach() for each in self._followed]
        else:
            tensors = counterparts(model, self._followed)
        return list(map(real, tensors))

    def __getstate__(self) -> dict[str, Any]:
        # What is prepared holds addresses, which mean nothing in a copy or in another process.
        self._wait()
        return {**self.__dict__, "_execution": None}
