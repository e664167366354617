"""torch_ema's ExponentialMovingAverage with the update fused."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastswa.list_update import ListUpdate
from fastswa.rules import EMA
from fastswa.warmups import RatioWarmup

_STATE = ("decay", "num_updates", "shadow_params", "collected_params")


class ExponentialMovingAverage:
    r"""An exponential moving average of parameters, in place of `torch_ema.ExponentialMovingAverage`.

    .. math:: s \leftarrow s + (1 - d) (p - s), \qquad d = \min\left(d_\mathrm{target}, \frac{1 + n}{10 + n}\right)

    The n-th update uses n, counted from 1; d is constant without `use_num_updates`. The averages begin as the
    parameters. The same arguments, methods, attributes and state as torch_ema 0.3, with which it is interchangeable; it
    is no subclass, so that torch_ema need not be installed.

    It differs on purpose: an average in bfloat16 or float16 is rounded once a step, not three times. Integer tensors
    are copied. `load_state_dict` keeps the averages' present dtype and device, so that averages in float32 of a
    bfloat16 model stay exact; torch_ema casts them to the parameters'. Other shapes are refused there and in `update`,
    `copy_to` and `restore`, and nothing has been written then. Writes into parameters show to autograd.

    The averages move into common buffers at the first update: a view of one that was made before follows no longer.

    Args:
        parameters: tensors to average; not kept alive.
        decay: the target, in [0, 1].
        use_num_updates: let the decay grow with the number of updates.

    Raises:
        ValueError: a decay outside [0, 1], or NaN.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> ema = ExponentialMovingAverage(model.parameters(), decay=0.995)
        >>> ema.update()
        >>> with ema.average_parameters():
        ...     prediction = model(torch.randn(8, 4))

    References:
        torch_ema 0.3, torch_ema/ema.py.
    """

    def __init__(self, parameters: Iterable[Tensor], decay: float, use_num_updates: bool = True) -> None:
        EMA(decay)
        self.decay = decay
        """The target of the decay; may be set."""
        self.num_updates = 0 if use_num_updates else None
        """How many updates there were, if they are counted."""
        followed = list(parameters)
        self.shadow_params = [tensor.detach().clone() for tensor in followed]
        """The averages."""
        self.collected_params: list[Tensor] | None = None
        """What `store` kept."""
        self._references = list(map(weakref.ref, followed))
        self._update: ListUpdate | None = None

    def update(self, parameters: Iterable[Tensor] | None = None) -> None:
        """Take the parameters' present values into the averages; call it after `optimizer.step()`.

        Args:
            parameters: those of the constructor if left out.

        Raises:
            ValueError: other shapes or another number; parameters of the constructor that are gone.
            TypeError: a tensor that can't be averaged.
        """
        sources = self._get(parameters)
        if self._update is None or not self._update.fits(self.shadow_params, sources):
            self._update = ListUpdate(self.shadow_params, sources)
        if self.num_updates is None:
            self._update.lerp_(EMA(self.decay).weight(1))
        else:
            self._update.lerp_(EMA(self.decay, warmup=RatioWarmup()).weight(self.num_updates + 1))
            self.num_updates += 1

    def copy_to(self, parameters: Iterable[Tensor] | None = None) -> None:
        """Write the averages into parameters; arguments and errors as for `update`."""
        _copy("the averages", self.shadow_params, self._get(parameters))

    def store(self, parameters: Iterable[Tensor] | None = None) -> None:
        """Keep a copy of parameters for `restore`; arguments and errors as for `update`."""
        kept = [tensor.detach().clone() for tensor in self._get(parameters)]
        _check("parameters", kept, self.shadow_params)
        self.collected_params = kept

    def restore(self, parameters: Iterable[Tensor] | None = None) -> None:
        """Write what `store` kept into parameters; a RuntimeError if that is nothing, else as for `update`."""
        if self.collected_params is None:
            raise RuntimeError("restore: nothing is stored; call store() first")
        _copy("what was stored", self.collected_params, self._get(parameters))

    @contextmanager
    def average_parameters(self, parameters: Iterable[Tensor] | None = None) -> Iterator[None]:
        """A context in which parameters hold the averages; afterwards they hold their own values, bit for bit.

        Args:
            parameters: those of the constructor if left out.
        """
        targets = self._get(parameters)
        self.store(targets)
        try:
            self.copy_to(targets)
            yield
        finally:
            self.restore(targets)

    def to(self, device: int | torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        """Move or convert the averages and what is stored.

        Args:
            device: the present one if left out.
            dtype: of floating tensors; the present one if left out.
        """

        def moved(tensors: list[Tensor]) -> list[Tensor]:
            return [each.to(device=device, dtype=dtype if each.is_floating_point() else None) for each in tensors]

        self.shadow_params = moved(self.shadow_params)
        self.collected_params = None if self.collected_params is None else moved(self.collected_params)

    def state_dict(self) -> dict[str, Any]:
        """The averages themselves, not copies, and all else that a resumed run needs, as torch_ema has it."""
        return {name: getattr(self, name) for name in _STATE}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where another run was saved, by this class or by torch_ema's.

        Args:
            state_dict: as `state_dict` gave it, of any floating dtype, on whatever device.

        Raises:
            ValueError: something is missing, of another kind, number or shape; nothing was loaded.
        """
        missing = next((name for name in _STATE if name not in state_dict), None)
        if missing is not None:
            raise ValueError(f"there is no {missing!r} in the state")
        decay, updates, averages, stored = (state_dict[name] for name in _STATE)
        EMA(decay)
        if not (updates is None or isinstance(updates, int)):
            raise ValueError(f"num_updates must be an int or None, got {updates!r}")
        _check("averages", averages, self.shadow_params)
        if stored is not None:
            _check("stored parameters", stored, self.shadow_params)
            stored = [
                tensor.detach().to(own, copy=True) for tensor, own in zip(stored, self.shadow_params, strict=True)
            ]
        _copy("the saved averages", averages, self.shadow_params)
        self.decay, self.num_updates, self.collected_params = decay, updates, stored

    def _get(self, parameters: Iterable[Tensor] | None) -> list[Tensor]:
        if parameters is not None:
            return list(parameters)
        alive = [tensor for reference in self._references if (tensor := reference()) is not None]
        if len(alive) < len(self._references):
            raise ValueError("parameters of the constructor no longer exist; keep their model, or pass parameters")
        return alive

    def __getstate__(self) -> dict[str, Any]:
        # What is prepared holds addresses, which mean nothing in a copy.
        return {**self.__dict__, "_update": None}


def _check(what: str, tensors: object, others: list[Tensor]) -> None:
    if not isinstance(tensors, list) or not all(isinstance(tensor, Tensor) for tensor in tensors):
        raise ValueError(f"the {what} must be a list of tensors")
    shapes, expected = ([tuple(tensor.shape) for tensor in each] for each in (tensors, others))
    if shapes != expected:
        raise ValueError(
            f"there are {len(shapes)} {what} for {len(expected)} tensors, of shapes {shapes} for {expected}"
        )


@torch.no_grad()
def _copy(what: str, values: list[Tensor], targets: list[Tensor]) -> None:
    _check(what, values, targets)
    if targets:
        torch._foreach_copy_(targets, values)
