"""Two operations of torch that average lists of tensors: `_foreach_lerp_`, and on a CPU its fused SGD.

SGD moves a weight whose gradient is the source and whose weight decay is -1 as an average moves:
a - lr (p + (-1) a) is a + w (p - a) where lr = -w. Both move 12 bytes an element of float32. The fused SGD reaches a
tensor without torch's dispatch and gives each to all threads; `lerp_` starts a second one at 32768 elements.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastswa_kernels.pairs import dense_view, same_layout

WORTH_A_THREAD = 1 << 13
"""Elements of a tensor that are worth the start of one more thread: about 4 us."""

Lerp = Callable[[list[Tensor], list[Tensor], float], object]
"""Moves averages towards their sources by a weight below 1."""


def quickest(average: Tensor, source: Tensor, compute: torch.dtype) -> Lerp:
    """The operation for a pair, or for several alike.

    Args:
        average: to be written.
        source: of its shape.
        compute: the dtype that both have or are converted to.

    Returns:
        A function of averages, their sources and the weight.

    Example:
        >>> average, source = torch.zeros(1 << 20), torch.ones(1 << 20)
        >>> quickest(average, source, torch.float32)([average], [source], 0.25)
        >>> average[0]
        tensor(0.2500)
    """
    fused = (
        average.device.type == source.device.type == "cpu"
        # Of half precision the CPU's fused SGD without momentum writes nothing.
        and compute in (torch.float32, torch.float64)
        and average.numel() >= WORTH_A_THREAD * (torch.get_num_threads() - 1)
        # It goes through the memory, whatever the strides.
        and average.is_contiguous()
        and source.is_contiguous()
    )
    return _fused_lerp_ if fused else torch._foreach_lerp_


def in_memory_order(average: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
    """A pair as it is, or views of one dimension where it lies alike in memory, but in no order of its indices.

    Args:
        average: any strides.
        source: of its shape.
    """
    if average.is_contiguous() or not same_layout(average, source):
        return average, source
    to, origin = dense_view(average), dense_view(source)
    return (average, source) if to is None or origin is None else (to, origin)


def _fused_lerp_(averages: list[Tensor], sources: list[Tensor], weight: float) -> None:
    if weight >= 0.5:
        # From the source, which is then the nearer end: SGD knows the other form only.
        torch._foreach_lerp_(averages, sources, weight)
        return
    torch._fused_sgd_(
        averages,
        sources,
        [],
        weight_decay=-1.0,
        momentum=0.0,
        lr=-weight,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=False,
    )
