"""A module kept as the average of another: pairing, flat buffers and launch, prepared once and checked each step."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fastswa import backends
from fastswa.flat import FlatBuffers
from fastswa.pairing import Pair, pair_buffers, pair_parameters
from fastswa.watch import MemoryWatch, TensorWatch

_FLOAT = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_COMPLEX = (torch.complex64, torch.complex128)


class ModuleUpdate:
    """The prepared update of one averaged module from one model.

    Args:
        averaged: the module whose tensors are averages. They are moved into flat buffers.
        model: the module that is being trained. It is read, not kept alive.
        use_buffers: average the floating buffers too; otherwise they are copied. Integer buffers are copied always.
        backend: as `backends.choose` takes it.
        previous: an update that was prepared for the same averaged module; its buffers are used again.

    Raises:
        ValueError: the modules do not pair, or share memory; names the first tensor.
        TypeError: a tensor of a kind that can't be averaged; names it.
        RuntimeError: backend "triton" can't run; says why.
    """

    def __init__(
        self,
        averaged: nn.Module,
        model: nn.Module,
        use_buffers: bool,
        backend: str,
        previous: ModuleUpdate | None = None,
    ) -> None:
        lerps, copies = sort_pairs(averaged, model, use_buffers)
        self._settings = (averaged, use_buffers, backend)
        self._flat: FlatBuffers
        self._averaged_watch: MemoryWatch
        if previous and previous._settings == self._settings and previous._averaged_watch.unchanged():
            self._flat = previous._flat
        else:
            self._flat = FlatBuffers([pair.average for pair in (*lerps, *copies)])
        self._averaged_watch = MemoryWatch(averaged)
        self._update: backends.Update | None = backends.prepare(
            [_real(pair.average) for pair in lerps],
            [_real(pair.source) for pair in lerps],
            [pair.average for pair in copies],
            [pair.source for pair in copies],
            backend,
            self._flat,
        )
        # A complex tensor is read through a real view, so the tensor itself has to be watched.
        views = [pair.source for pair in lerps if pair.source.is_complex()]
        self._model_watch: TensorWatch | None = TensorWatch(model, [*self._update.by_address, *views])
        # The prepared lists would keep the model's memory alive after the model is gone.
        self._model = weakref.ref(model, self._forget)

    def fits(self, averaged: nn.Module, model: nn.Module, use_buffers: bool, backend: str) -> bool:
        """Whether the update is still right for these modules and settings, in their present memory."""
        return (
            self._model() is model
            and self._settings == (averaged, use_buffers, backend)
            and self._averaged_watch.unchanged()
            and self._model_watch is not None
            and self._model_watch.unchanged()
        )

    def lerp_(self, weight: float | Tensor) -> None:
        """Move the averages towards the model by `weight`, and copy what is copied.

        Args:
            weight: in [0, 1]: a float, or a 0-dimensional tensor on the averages' device.
        """
        assert self._update is not None  # the caller asked fits()
        self._update.lerp_(weight)

    def _forget(self, _: object) -> None:
        self._update = self._model_watch = None


def sort_pairs(averaged: nn.Module, model: nn.Module, use_buffers: bool) -> tuple[list[Pair], list[Pair]]:
    """The pairs to average and the pairs to copy, so ordered that small ones of a kind are neighbours in memory.

    Args:
        averaged: the module of averages.
        model: the module they follow.
        use_buffers: whether floating buffers are averaged.

    Returns:
        Pairs to average, pairs to copy.

    Raises:
        ValueError: names the first parameter or buffer that does not pair, holds no values, or is in both modules.
        TypeError: names the first parameter or buffer whose dtype can't be averaged.
    """
    check_values(averaged, "the averaged module")
    check_values(model, "the model")
    parameters, buffers = pair_parameters(averaged, model), pair_buffers(averaged, model)
    lerps = [pair for pair in parameters if _is_inexact(pair.average)]
    copies = [pair for pair in parameters if not _is_inexact(pair.average)]
    for pair in buffers:
        (lerps if use_buffers and _is_inexact(pair.average) else copies).append(pair)
    for pair in (*lerps, *copies):
        if pair.average is pair.source:
            raise ValueError(f"{pair.name!r} of the averaged module is the model's own; the average needs its own")
    for pair in lerps:
        kinds = _FLOAT if pair.average.is_floating_point() else _COMPLEX
        if pair.average.dtype not in kinds or pair.source.dtype not in kinds:
            raise TypeError(
                f"{pair.name!r} can't be averaged: it is {pair.average.dtype} in the average "
                f"and {pair.source.dtype} in the model"
            )
    for pairs in (lerps, copies):
        pairs.sort(key=lambda pair: (str(pair.average.dtype), str(pair.source.dtype), pair.average.numel()))
    return lerps, copies


def check_values(module: nn.Module, role: str) -> None:
    """Refuse a module with tensors that hold no values yet.

    Args:
        module: the module to look through.
        role: what the error calls it.

    Raises:
        ValueError: names the first lazy or meta tensor.
    """
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if is_lazy(tensor):
            raise ValueError(f"{name!r} of {role} is not initialised; run one forward pass before averaging")
        if tensor.is_meta:
            raise ValueError(f"{name!r} of {role} is on the meta device and holds no values; load the weights first")


def refusal(*modules: nn.Module) -> str | None:
    """Why the fused update can't serve some modules, so that torch's own loop over tensors has to.

    Args:
        modules: the averaged module and the model.

    Returns:
        The reason in words, naming the first tensor, or None.
    """
    for module in modules:
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if type(tensor.data) is not Tensor:
                return f"{name!r} is a {type(tensor.data).__name__}"
            if tensor.layout != torch.strided:
                return f"{name!r} is {tensor.layout}"
            if tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
                return f"{name!r} is a quantized, conjugated or negated view"
    return None


def _is_inexact(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _real(tensor: Tensor) -> Tensor:
    # A real tensor itself, not a view of it: whoever checked it has just brought it into the cache.
    return torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor
