"""A module kept as the average of another: pairing, flat buffers and launch, prepared once and checked each step."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fastswa import backends, shards
from fastswa.flat import FlatBuffers
from fastswa.pairing import Pair, named_tensors, pair_buffers, pair_parameters
from fastswa.updates import Random
from fastswa.watch import TensorWatch

_FLOAT = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_COMPLEX = (torch.complex64, torch.complex128)

Sort = Callable[[nn.Module, nn.Module], tuple[list[Pair], list[Pair]]]
"""Takes the averaged module and the model; gives the pairs to average and the pairs to copy."""

Lerp = Callable[[float | Tensor, Random], None]
"""Runs a prepared update by a weight; with seed and step, if it was prepared to round stochastically."""


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
        sort: chooses the pairs, by `divide`; `sort_pairs` with `use_buffers` if left out.
        stochastic: prepare for stochastic rounding of bfloat16 and float16 averages.

    Raises:
        ValueError: the modules do not pair, or share tensors; names the first.
        TypeError: a tensor of a dtype that can't be averaged; names it.
        RuntimeError: backend "triton" can't run; says why.
    """

    def __init__(
        self,
        averaged: FlatModule,
        model: nn.Module,
        use_buffers: bool,
        backend: str,
        sort: Sort | None = None,
        stochastic: bool = False,
    ) -> None:
        lerps, copies = (sort or partial(sort_pairs, use_buffers=use_buffers))(averaged.module, model)
        self._settings = (averaged, use_buffers, backend)
        self.on_gpu = any(pair.average.is_cuda for pair in (*lerps, *copies))
        """Whether the update may find itself in the capture of a CUDA graph."""
        averages = [pair.average for pair in lerps]
        self._trained = [tensor for tensor in averages if tensor.requires_grad and not tensor.is_inference()]
        self._update: Lerp | None = prepare_lerp(
            list(map(_real, averages)),
            [_real(pair.source) for pair in lerps],
            [pair.average for pair in copies],
            [pair.source for pair in copies],
            backend,
            averaged.buffers,
            stochastic,
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

    def lerp_(self, weight: float | Tensor, random: Random = None) -> None:
        """Move the averages towards the model by `weight`, and copy what is copied.

        Args:
            weight: in [0, 1]: a float, or a 0-dimensional tensor on the averages' device.
            random: seed and step of stochastic rounding, if it was prepared for; None to round to nearest.
        """
        assert self._update is not None  # the caller asked fits()
        self._update(weight, random)

    def invalidate_graphs(self) -> None:
        """Make a graph that saved the averages before `lerp_` fail, as after any write in place.

        The averages are written through their buffers, which autograd can't see. Telling it costs 65 ns a tensor.
        """
        torch.autograd.graph.increment_version(self._trained)


def _forget(update: weakref.ref[ModuleUpdate], _: object) -> None:
    alive = update()
    if alive is not None:
        alive._update = alive._watch = None


def prepare_lerp(
    averages: Sequence[Tensor],
    sources: Sequence[Tensor],
    copy_to: Sequence[Tensor],
    copy_from: Sequence[Tensor],
    backend: str,
    flat: FlatBuffers,
    stochastic: bool,
) -> Lerp:
    """Prepare the update of one set of averages, with or without stochastic rounding.

    Args:
        averages, sources, copy_to, copy_from, backend, flat: as `backends.prepare` takes them.
        stochastic: prepare for stochastic rounding; without half-precision averages nothing is rounded so.

    Returns:
        The prepared update.

    Raises:
        ValueError: sources that overlap the averages in memory.
        RuntimeError: "triton" was asked for by name and can't run; says why.
    """
    if not stochastic or not any(average.dtype in (torch.bfloat16, torch.float16) for average in averages):
        update = backends.prepare(averages, sources, copy_to, copy_from, backend, flat)
        return lambda weight, random: update.lerp_(weight)
    numbers = shards.first_elements(averages)
    sets = backends.prepare_sets([averages], sources, copy_to, copy_from, backend, [flat], flat, numbers)
    return lambda weight, random: sets.lerp_(
        weight.reshape(1) if isinstance(weight, Tensor) else (weight,), random, None
    )


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
    parameters, buffers = pair_parameters(averaged, model), pair_buffers(averaged, model)
    return divide([*parameters, *buffers], () if use_buffers else {pair.name for pair in buffers})


def divide(pairs: Iterable[Pair], copied: Collection[str] = ()) -> tuple[list[Pair], list[Pair]]:
    """Divide pairs into those to average and those to copy, each in the order in which `FlatModule` lays tensors out.

    Args:
        pairs: parameters and buffers, in the module's order.
        copied: names of tensors that are copied though they are floating. Integers are copied always.

    Returns:
        Pairs to average, pairs to copy.

    Raises:
        ValueError: names the first tensor that is in both modules.
        TypeError: names the first tensor whose dtype can't be averaged.
    """
    lerps: list[Pair] = []
    copies: list[Pair] = []
    for pair in sorted(
        pairs, key=lambda pair: (not isinstance(pair.average, nn.Parameter), *_neighbourhood(pair.average))
    ):
        if pair.average is pair.source:
            raise ValueError(f"{pair.name!r} of the averaged module is the model's own; the average needs its own")
        (lerps if _is_inexact(pair.average) and pair.name not in copied else copies).append(pair)
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
    for name, tensor in named_tensors(module, "_parameters", "_buffers"):
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
        for name, tensor in named_tensors(module, "_parameters", "_buffers"):
            reason = tensor_refusal(tensor)
            if reason is not None:
                return f"{name!r} is {reason}"
    return None


def tensor_refusal(tensor: Tensor) -> str | None:
    """Why the fused update can't serve a tensor.

    Args:
        tensor: of an average or a model.

    Returns:
        What it is, in words, or None.

    Example:
        >>> tensor_refusal(torch.zeros(2).to_sparse())
        'torch.sparse_coo'
    """
    if type(tensor.data) is not Tensor:
        return f"a {type(tensor.data).__name__}"
    if tensor.layout != torch.strided:
        return str(tensor.layout)
    if tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
        return "a quantized, conjugated or negated view"
    return None


def _neighbourhood(tensor: Tensor) -> tuple[str, int]:
    return str(tensor.dtype), tensor.numel()


def _is_inexact(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _real(tensor: Tensor) -> Tensor:
    # A real tensor itself, not a view of it: whoever checked it has just brought it into the cache.
    return torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor
