"""Recompute BatchNorm statistics for averaged weights: torch's numbers, no host read for each layer, all or nothing."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy


@torch.no_grad()
def update_bn(loader: Iterable[Any], model: nn.Module, device: int | torch.device | str | None = None) -> None:
    r"""Set every BatchNorm layer's running statistics to the averages over a pass through the data.

    .. math:: \mu = \frac{1}{K} \sum_{k=1}^{K} \mu_k, \qquad \sigma^2 = \frac{1}{K} \sum_{k=1}^{K} \sigma_k^2

    over the K batches' means and unbiased variances, computed by the layers themselves in training mode: the numbers
    of torch.optim.swa_utils.update_bn, bit for bit on a CPU. The layers count batches on the host, so no layer waits
    for the device. Nothing is changed unless the whole pass succeeds; afterwards momenta, counters' identity and each
    module's mode are as they were. A layer that no batch reached keeps its statistics, with a warning.

    As in torch the whole model runs in training mode, so dropout is active, and modules that update buffers of their
    own while training do so.

    Args:
        loader: an iterable of batches: tensors, or lists or tuples whose first element is passed to the model.
        model: the model, such as an AveragedModel; its BatchNorm layers (also SyncBatchNorm) are updated in place.
        device: where batches are moved; left where they are if left out.

    Raises:
        ValueError: no batches (an empty or exhausted loader); statistics that are not finite, naming the layers; a
            layer that is not initialised.
        TypeError: a torch.jit.script model, whose layers can't be reached.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
        >>> swa_model = AveragedModel(model)
        >>> swa_model.update_parameters(model)
        >>> update_bn([torch.randn(16, 4) for _ in range(5)], swa_model)
        >>> int(swa_model.module[1].num_batches_tracked)
        5

    References:
        Izmailov et al. 2018, Averaging Weights Leads to Wider Optima and Better Generalization, section 3.2;
        torch.optim.swa_utils.update_bn.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("update_bn can't reach the layers of a torch.jit.script model; call it before scripting")
    collected: dict[int, Tensor] = {}
    layers = [
        _Layer.of(name or "the model", module, collected)
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    ]
    if not layers:
        return
    with _restored_on_failure(model, layers):
        with _collecting(model, layers) as collecting:
            batches = 0
            for batch in loader:
                if isinstance(batch, (list, tuple)):
                    batch = batch[0]
                model(batch if device is None else batch.to(device))
                batches += 1
        if not batches:
            raise ValueError("the loader gave no batches; an iterator that was used before is exhausted")
        _commit(collecting)


@dataclass
class _Layer:
    """A BatchNorm layer, what it had before the pass, and what the pass collects."""

    name: str
    module: _BatchNorm
    momentum: float | None
    before: dict[str, Tensor | None]
    collected: dict[str, Tensor | None]

    @classmethod
    def of(cls, name: str, module: _BatchNorm, known: dict[int, Tensor]) -> _Layer:
        before = {key: module._buffers[key] for key in ("running_mean", "running_var", "num_batches_tracked")}
        for key, tensor in before.items():
            if tensor is not None and (is_lazy(tensor) or tensor.is_meta):
                raise ValueError(f"{name}.{key} holds no values; run one forward pass before update_bn")
        collected = {
            # Layers that share a buffer go on sharing it.
            key: None if tensor is None else known.setdefault(id(tensor), _reset(key, tensor))
            for key, tensor in before.items()
        }
        return cls(name, module, module.momentum, before, collected)

    @property
    def batches(self) -> int:
        count = self.collected["num_batches_tracked"]
        return 0 if count is None else int(count)


def _reset(key: str, tensor: Tensor) -> Tensor:
    """What a layer's buffer is at the start of the pass."""
    if key == "num_batches_tracked":
        # On the CPU, whatever the device: with momentum None the layer reads its counter at every batch.
        return torch.zeros((), dtype=tensor.dtype, device="cpu")
    return torch.zeros_like(tensor) if key == "running_mean" else torch.ones_like(tensor)


@contextmanager
def _collecting(model: nn.Module, layers: list[_Layer]) -> Iterator[list[_Layer]]:
    """Let the layers write into buffers of the pass, and give them back their own afterwards, come what may.

    Yields the layers that do so: one that its model keeps in evaluation mode goes on using its own statistics.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.train()
        collecting = [layer for layer in layers if layer.module.training and layer.module.track_running_stats]
        for layer in collecting:
            layer.module._buffers.update(layer.collected)
            # None makes the layer average cumulatively.
            layer.module.momentum = None
        yield collecting
    finally:
        for layer in layers:
            layer.module._buffers.update(layer.before)
            layer.module.momentum = layer.momentum
        for module, mode in modes:
            module.training = mode


@contextmanager
def _restored_on_failure(model: nn.Module, layers: list[_Layer]) -> Iterator[None]:
    """Undo what other modules' training mode wrote into their buffers (instance or spectral norm), on any exception."""
    own = {id(tensor) for layer in layers for tensor in layer.before.values()}
    values = [(tensor, tensor.clone()) for tensor in model.buffers() if id(tensor) not in own]
    slots = [(module, dict(module._buffers)) for module in model.modules()]
    try:
        yield
    except BaseException:
        for module, slot in slots:
            module._buffers.update(slot)
        for tensor, value in values:
            tensor.copy_(value)
        raise


def _commit(layers: list[_Layer]) -> None:
    reached = [layer for layer in layers if layer.batches]
    unreached = [layer.name for layer in layers if not layer.batches]
    if unreached:
        warnings.warn(f"no batch reached {', '.join(unreached)}; their statistics are kept", stacklevel=4)
    statistics = [
        tensor
        for layer in reached
        for tensor in (layer.collected["running_mean"], layer.collected["running_var"])
        if tensor is not None
    ]
    # One read for each device and dtype, not one for each layer.
    kinds = {(tensor.device, tensor.dtype) for tensor in statistics}
    finite = [torch.cat([t for t in statistics if (t.device, t.dtype) == kind]).isfinite().all() for kind in kinds]
    if not all(map(bool, finite)):
        spoilt = [
            layer.name
            for layer in reached
            if any(t is not None and not t.isfinite().all() for t in layer.collected.values())
        ]
        raise ValueError(
            f"the statistics of {', '.join(spoilt)} are not finite; a batch or the weights hold NaN or infinity"
        )
    for layer in reached:
        for key, target in layer.before.items():
            value = layer.collected[key]
            if target is not None and value is not None:
                target.copy_(value)
