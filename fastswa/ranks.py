"""average_across_ranks_: ranks that trained alone become their mean."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.optim.swa_utils import AveragedModel

from fastswa import shards
from fastswa.agreement import agreeing
from fastswa.pairing import canonical
from fastswa.weight_averages import WeightAverages


@torch.no_grad()
def average_across_ranks_(
    model_or_averages: nn.Module | WeightAverages,
    group: distributed.ProcessGroup | None = None,
    weights: float | None = None,
    *,
    check_ranks: bool = True,
) -> None:
    r"""Put the mean over ranks in the place of each rank's weights or averages.

    .. math:: \theta \leftarrow \frac{\sum_r w_r \theta_r}{\sum_r w_r}

    One all-reduce for each dtype of arithmetic: float64 for float64 tensors, float32 for all others, which are rounded
    once at the end. All ranks end with the same bits. It needs the memory of one more copy in that dtype. Integer
    tensors stay as they are, tied ones count once. Statistics of BatchNorm are averaged like other floating buffers,
    which is not what they would be for the averaged weights: let `update_bn(process_group=...)` follow.

    Args:
        model_or_averages: a module, as it is or wrapped by DistributedDataParallel or torch.compile; an AveragedModel,
            of which the average is meant; or a WeightAverages, of which all averages are. Numbers of averaged models
            stay each rank's own.
        group: of the ranks, which all call this; all ranks if left out.
        weights: this rank's weight, such as the number of samples it trained on, at least 0; 1 if left out.
        check_ranks: compare names, shapes and dtypes first, by a small gather of objects, so that all fail together.

    Raises:
        ValueError: a weight that is negative or not finite, or no weight on any rank; ranks that differ, with the first
            tensor by name. Nothing has been written.
        TypeError: a DTensor or another tensor that is not held whole; names it.
        RuntimeError: without torch.distributed, outside the group, or inside `swapped`; another rank failed.

    Example:
        >>> from torch import distributed
        >>> model = torch.nn.Linear(4, 2)
        >>> distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
        >>> average_across_ranks_(model)
        >>> distributed.destroy_process_group()

    References:
        Gupta, Serrano, DeCoste 2020, Stochastic Weight Averaging in Parallel, Algorithm 1, phase 3.
        Stich 2019, Local SGD Converges Fast and Communicates Little, Algorithm 1.
    """
    if not distributed.is_initialized():
        raise RuntimeError("average_across_ranks_ needs torch.distributed.init_process_group first")
    group = group or distributed.group.WORLD
    assert group is not None
    if distributed.get_rank(group) < 0:
        raise RuntimeError(f"rank {distributed.get_rank()} is not in the group; call it on the group's ranks only")
    weight = 1.0 if weights is None else float(weights)
    tensors: dict[str, Tensor] = {}
    with agreeing([group] if check_ranks else [], "average_across_ranks_", lambda: _facts(model_or_averages, tensors)):
        if not 0 <= weight < math.inf:
            raise ValueError(f"weights must be a finite number of at least 0, got {weights}")
        tensors.update(_tensors(model_or_averages))
        for name, tensor in tensors.items():
            reason = _refusal(tensor)
            if reason is not None:
                raise TypeError(f"{name!r} {reason}")
    sums = [_Sum(dtype, tensors, weight) for dtype in dict.fromkeys(map(_wide, tensors.values()))]
    for each in sums:
        distributed.all_reduce(each.flat, group=group)
    total = float(sums[0].flat[-1]) if sums else 1.0
    if total == 0:
        raise ValueError("weights are 0 on all ranks")
    for each in sums:
        each.write(total)


class _Sum:
    """Tensors end to end, times this rank's weight, and after them the weight, which so needs no all-reduce of its own.

    Args:
        dtype: of the arithmetic.
        tensors: by name, of which those count that are summed in this dtype.
        weight: of this rank.
    """

    def __init__(self, dtype: torch.dtype, tensors: Mapping[str, Tensor], weight: float) -> None:
        self._tensors = [
            torch.view_as_real(tensor) if tensor.is_complex() else tensor
            for tensor in tensors.values()
            if _wide(tensor) == dtype
        ]
        sizes = [tensor.numel() for tensor in self._tensors]
        self.flat = torch.empty(sum(sizes) + 1, dtype=dtype, device=self._tensors[0].device)
        pieces = torch.split(self.flat[:-1], sizes)
        self._views = [piece.view(tensor.shape) for piece, tensor in zip(pieces, self._tensors, strict=True)]
        torch._foreach_copy_(self._views, self._tensors)
        # Not 0 times what the rank holds, which may be NaN where it has trained on nothing.
        self.flat.mul_(weight) if weight else self.flat.zero_()
        self.flat[-1] = weight

    def write(self, total: float) -> None:
        """Write the means, once the sums are those of all ranks.

        Args:
            total: of the ranks' weights.
        """
        self.flat.div_(total)
        torch._foreach_copy_(self._tensors, self._views)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype in (torch.float64, torch.complex128) else torch.float32


def _tensors(model_or_averages: nn.Module | WeightAverages) -> Iterator[tuple[str, Tensor]]:
    """Floating tensors, each once, by name."""
    if isinstance(model_or_averages, WeightAverages):
        state = model_or_averages.state_dict()
        named = [(f"{name}.{n}", each) for name, sets in state["averages"].items() for n, each in enumerate(sets)]
        tensors = [
            (f"{average}.{name}", tensor)
            for average, each in (*named, ("copies", state["copies"]))
            for name, tensor in each.items()
        ]
    else:
        model = model_or_averages
        if isinstance(model, AveragedModel):
            assert isinstance(model.module, nn.Module)
            model = model.module
        tensors = [*nn.Module.named_parameters(model), *nn.Module.named_buffers(model)]
    for name, tensor in tensors:
        if tensor.is_floating_point() or tensor.is_complex():
            yield canonical(name), tensor.detach()


def _refusal(tensor: Tensor) -> str | None:
    if shards.is_sharded(tensor):
        return f"is a DTensor, placed as {tensor.placements}: the ranks share it, but each must have a whole one"
    if tensor.layout != torch.strided or tensor.is_meta:
        return f"is {'on the meta device' if tensor.is_meta else tensor.layout}, and can't be averaged"
    return None


def _facts(model_or_averages: nn.Module | WeightAverages, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    facts: dict[str, Any] = {repr(name): f"{tensor.dtype} {tuple(tensor.shape)}" for name, tensor in tensors.items()}
    if isinstance(model_or_averages, WeightAverages):
        counts = model_or_averages.n_averaged
        for name, rule in model_or_averages.rules.items():
            facts[f"the rule of {name!r}"] = rule
            # Which of several sets holds what depends on the count.
            if rule.copies > 1:
                facts[f"the number of models in {name!r}"] = counts[name]
    return facts
