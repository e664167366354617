"""A module kept as the average of another: pairing, flat buffers and launch, prepared once and checked each step."""

from __future__ import annotations

import weakref
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fastswa import backends
from fastswa.flat import FlatBuffers
from fastswa.pairing import Pair, pair_buffers, pair_parameters
from fastswa.updates import Update
from fastswa.watch import TensorWatch

_FLOAT = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_COMPLEX = (torch.complex64, torch.complex128)


class FlatModule:
    """A module whose tensors were moved into flat buffers, small ones of a kind next to one another.

    Args:
        module: the module; its tensors keep their identity and get other memory. While they move, there is room for
            both.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        parameters, buffers = list(module.parameters()), list(module.buffers())
        self.buffers = FlatBuffers([*sorted(parameters, key=_neighbourhood), *sorted(buffers, key=_neighbourhood)])
        self._watch = TensorWatch(module, every_address=False)

    def holds(self, module: nn.Module) -> bool:
        """Whether this is the module, and its tensors are still in the buffers.

        Args:
            module: that is to be updated.
        """
        return self.module is module and self.buffers.intact and self._watch.unchanged()


class ModuleUpdate:
    """The prepared update of one averaged module from one model.

    Args:
        averaged: the module whose tensors are averages.
        model: the module that is being trained. It is read, and not kept alive, unless its parts refer back to it.
        use_buffers: average the floating buffers too; otherwise they are copied. Integer buffers are copied always.
        backend: as `backends.choose` takes it.

    Raises:
        ValueError: the modules do not pair, or share tensors; names the first.
        TypeError: a tensor of a dtype that can't be averaged; names it.
        RuntimeError: backend "triton" can't run; says why.
    """

    def __init__(self, averaged: FlatModule, model: nn.Module, use_buffers: bool, backend: str) -> None:
        lerps, copies = sort_pairs(averaged.module, model, use_buffers)
        self._settings = (averaged, use_buffers, backend)
        self.on_gpu = any(pair.average.is_cuda for pair in (*lerps, *copies))
        """Whether the update may find itself in the capture of a CUDA graph."""
        averages = [pair.average for pair in lerps]
        self._trained = [tensor for tensor in averages if tensor.requires_grad and not tensor.is_inference()]
        self._update: Update | None = backends.prepare(
            list(map(_real, averages)),
            [_real(pair.source) for pair in lerps],
            [pair.average for pair in copies],
            [pair.source for pair in copies],
            backend,
            averaged.buffers,
        )
        self._watch: TensorWatch | None = TensorWatch(model)
        # The prepared lists would keep the model's memory alive after the model is gone.
        self._model = weakref.ref(model, partial(_forget, weakref.ref(self)))

    def fits(self, averaged: FlatModule, model: nn.Module, use_buffers: bool, backend: str) -> bool:
        """Whether the update is still right for these modules and settings, in the model's present memory."""
        return (
            self._model() is model
            and self._settings == (averaged, use_buffers, backend)
            and self._watch is not None
            and self._watch.unchanged()
        )

    def lerp_(self, weight: float | Tensor) -> None:
        """Move the averages towards the model by `weight`, and copy what is copied.

        Args:
            weight: in [0, 1]: a float, or a 0-dimensional tensor on the averages' device.
        """
        assert self._update is not None  # the caller asked fits()
        self._update.lerp_(weight)

    def invalidate_graphs(self) -> None:
        """Make a graph that saved the averages before `lerp_` fail, as after any write in place.

        The averages are written through their buffers, which autograd can't see. Telling it costs 65 ns a tensor.
        """
        torch.autograd.graph.increment_version(self._trained)


def _forget(update: weakref.ref[ModuleUpdate], _: object) -> None:
    alive = update()
    if alive is not None:
        alive._update = alive._watch = None


def sort_pairs(averaged: nn.Module, model: nn.Module, use_buffers: bool) -> tuple[list[Pair], list[Pair]]:
    """The pairs to average and the pairs to copy, each in the order in which `FlatModule` lays tensors out.

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
    parameters = sorted(pair_parameters(averaged, model), key=lambda pair: _neighbourhood(pair.average))
    buffers = sorted(pair_buffers(averaged, model), key=lambda pair: _neighbourhood(pair.average))
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
        if any(isinstance(part, torch.jit.ScriptModule) for part in module.modules()):
            return "a part of it is scripted, and hides its tensors' replacement"
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if type(tensor.data) is not Tensor:
                return f"{name!r} is a {type(tensor.data).__name__}"
            if tensor.layout != torch.strided:
                return f"{name!r} is {tensor.layout}"
            if tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
                return f"{name!r} is a quantized, conjugated or negated view"
    return None


def _neighbourhood(tensor: Tensor) -> tuple[str, int]:
    return str(tensor.dtype), tensor.numel()


def _is_inexact(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _real(tensor: Tensor) -> Tensor:
    # A real tensor itself, not a view of it: whoever checked it has just brought it into the cache.
    return torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor
