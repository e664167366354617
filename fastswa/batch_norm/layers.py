"""The BatchNorm layers of a model: found, lent other buffers for a pass, and written when all went well."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from fastswa.pairing import canonical

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")

Statistics = tuple[Tensor, Tensor, int]
"""A layer's mean, variance, and by how many batches it was called; none where that is 0."""


@dataclass(frozen=True)
class Layer:
    """A BatchNorm layer with statistics, or several that share their buffers.

    Args:
        name: of the (first) module.
        modules: the layer's modules.
        own: each module's own buffers, by name.
    """

    name: str
    modules: list[_BatchNorm]
    own: list[dict[str, Tensor | None]]

    @property
    def mean(self) -> Tensor:
        """The layer's own running mean."""
        mean = self.own[0]["running_mean"]
        assert mean is not None  # find() left out layers without
        return mean

    @property
    def var(self) -> Tensor:
        """The layer's own running variance."""
        var = self.own[0]["running_var"]
        assert var is not None
        return var


def scripted_layer(model: nn.Module) -> str | None:
    """The name of a part that torch.jit.script hid from view and that may be a BatchNorm layer.

    Args:
        model: to look through.

    Returns:
        "the model", the name of a scripted BatchNorm layer in it, or None.
    """
    if isinstance(model, torch.jit.ScriptModule):
        return "the model"
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule) and "BatchNorm" in getattr(module, "original_name", ""):
            return repr(name)
    return None


def find(model: nn.Module, wanted: Callable[[str, nn.Module], bool] | None) -> tuple[list[Layer], list[_BatchNorm]]:
    """The layers of a model whose statistics are to be recomputed.

    Args:
        model: to look through.
        wanted: from a layer's name and module whether it takes part; all do if left out.

    Returns:
        The layers, and the BatchNorm modules that `wanted` left out.

    Raises:
        ValueError: a layer that is not initialised.
    """
    layers: dict[int, Layer] = {}
    excluded = []
    for path, module in model.named_modules():
        if not isinstance(module, _BatchNorm) or module.running_mean is None:
            continue
        name = canonical(path) or "the model"
        if wanted is not None and not wanted(name, module):
            excluded.append(module)
            continue
        own = {key: module._buffers[key] for key in _BUFFERS}
        for key, tensor in own.items():
            if tensor is not None and (is_lazy(tensor) or tensor.is_meta):
                raise ValueError(f"{name}.{key} holds no values; run one forward pass before update_bn")
        layer = layers.setdefault(id(module.running_mean), Layer(name, [], []))
        layer.modules.append(module)
        layer.own.append(own)
    return list(layers.values()), excluded


def data_parallel_device(model: nn.Module) -> torch.device | None:
    """Where a DataParallel wrapper keeps its model, and would bring the batches itself.

    Args:
        model: to look through.

    Returns:
        The device, or None without such a wrapper.
    """
    wrappers = (part for part in model.modules() if isinstance(part, DataParallel) and part.device_ids)
    return next((wrapper.src_device_obj for wrapper in wrappers), None)


@contextmanager
def in_one_place(model: nn.Module) -> Iterator[None]:
    """Keep wrappers from spreading buffers over devices or processes, and give every module its mode back at the end.

    DistributedDataParallel would send buffers before a batch, but each process has its own number of batches;
    DataParallel would copy the layers, and so lose what the copies collect.

    Args:
        model: whose modes may change meanwhile.
    """
    modes = [(part, part.training) for part in model.modules()]
    settings: list[tuple[nn.Module, str, object]] = []
    for part in model.modules():
        if isinstance(part, DistributedDataParallel):
            settings.append((part, "require_forward_param_sync", False))
        elif isinstance(part, DataParallel):
            settings.append((part, "device_ids", []))
    before = [(part, name, getattr(part, name)) for part, name, _ in settings]
    try:
        for part, name, value in settings:
            setattr(part, name, value)
        yield
    finally:

        def restore() -> None:
            for part, name, value in before:
                setattr(part, name, value)
            for part, mode in modes:
                part.training = mode

        _to_the_end(restore)


@contextmanager
def lent(layers: Sequence[Layer], buffers: Sequence[Mapping[str, Tensor]], momentum: float | None) -> Iterator[None]:
    """Let layers use other buffers and another momentum, and give them their own back at the end.

    Args:
        layers: of the model.
        buffers: for each layer, by name.
        momentum: for all of them; None makes a layer average cumulatively.
    """
    momenta = [(module, module.momentum) for layer in layers for module in layer.modules]
    try:
        for layer, other in zip(layers, buffers, strict=True):
            for module in layer.modules:
                module._buffers.update(other)
                module.momentum = momentum
        yield
    finally:

        def restore() -> None:
            for layer in layers:
                for module, own in zip(layer.modules, layer.own, strict=True):
                    module._buffers.update(own)
            for module, before in momenta:
                module.momentum = before

        _to_the_end(restore)


@contextmanager
def restored_on_failure(model: nn.Module, layers: Sequence[Layer]) -> Iterator[None]:
    """Undo what other modules' training mode wrote into their buffers (instance or spectral norm), on any exception.

    Args:
        model: all of whose buffers are put back.
        layers: whose own buffers nobody writes before the end, so that they need no copy.
    """
    own = {id(tensor) for layer in layers for buffers in layer.own for tensor in buffers.values()}
    values = [(tensor, tensor.clone()) for tensor in model.buffers() if id(tensor) not in own]
    slots = [(module, dict(module._buffers)) for module in model.modules()]
    try:
        yield
    except BaseException:

        def restore() -> None:
            for module, slot in slots:
                module._buffers.update(slot)
            for tensor, value in values:
                tensor.copy_(value)

        _to_the_end(restore)
        raise


def _to_the_end(restore: Callable[[], None]) -> None:
    """Restore once more where an exception cut it short: one may come at any moment from a signal's handler.

    The DataLoader reports a worker's death so, right after the pass over the data has failed of the same; an impatient
    user interrupts twice.
    """
    try:
        restore()
    except BaseException:
        restore()
        raise


def refuse_not_finite(layers: Sequence[Layer], statistics: Sequence[Statistics]) -> None:
    """Refuse statistics that are not finite in their layer's dtype. Waits for each device once.

    Args:
        layers: of the model.
        statistics: of each layer.

    Raises:
        ValueError: names the layers.
    """
    kinds: dict[tuple[torch.device, torch.dtype, torch.dtype], list[Tensor]] = {}
    for layer, (mean, var, calls) in zip(layers, statistics, strict=True):
        if calls:
            kinds.setdefault((mean.device, mean.dtype, layer.mean.dtype), []).extend((mean, var))
    if all(torch.cat(tensors).to(dtype).isfinite().all() for (_, _, dtype), tensors in kinds.items()):
        return
    raise not_finite(
        layer.name
        for layer, (mean, var, calls) in zip(layers, statistics, strict=True)
        if calls and not torch.cat((mean, var)).to(layer.mean.dtype).isfinite().all()
    )


def not_finite(names: Iterator[str]) -> ValueError:
    """The error for statistics that are not finite.

    Args:
        names: of the layers.
    """
    return ValueError(
        f"the statistics of {', '.join(names)} are not finite; a batch or the weights hold NaN or infinity"
    )


def commit(layers: Sequence[Layer], statistics: Sequence[Statistics]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Write statistics into the layers' own buffers. A layer that was never called keeps its own, with a warning.

    Args:
        layers: of the model.
        statistics: of each layer.

    Returns:
        The names of the layers that were written, and of those that were not.
    """
    written = tuple(layer.name for layer, (_, _, calls) in zip(layers, statistics, strict=True) if calls)
    never_called = tuple(layer.name for layer, (_, _, calls) in zip(layers, statistics, strict=True) if not calls)
    targets: list[Tensor] = []
    values: list[Tensor] = []
    for layer, (mean, var, calls) in zip(layers, statistics, strict=True):
        for own in layer.own if calls else ():
            for key, value in (("running_mean", mean), ("running_var", var)):
                target = own[key]
                if target is not None:
                    targets.append(target)
                    values.append(value)
            counter = own["num_batches_tracked"]
            if counter is not None:
                counter.fill_(calls)
    if targets:
        torch._foreach_copy_(targets, values)
    if never_called:
        warnings.warn(f"no batch reached {', '.join(never_called)}; their statistics are kept", stacklevel=4)
    return written, never_called
