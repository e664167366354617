"""What may be averaged with what: the checks shared by the kernels and by the reference."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real

import numpy as np
import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""The dtypes that an average and a source may have, in any combination."""


def dense_view(tensor: Tensor) -> Tensor | None:
    """A one-dimensional view of a tensor's elements in the order of their addresses.

    Args:
        tensor: any shape, any strides (contiguous, channels_last, transposed, ...).

    Returns:
        The view, or None where the elements have gaps or overlaps and no such view exists.

    Example:
        >>> weight = torch.empty(8, 4, 3, 3).to(memory_format=torch.channels_last)
        >>> dense_view(weight).shape
        torch.Size([288])
    """
    tensor = tensor.detach()
    if tensor.is_contiguous():
        return tensor.view(-1)
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    ordered = tensor.permute(order)
    return ordered.view(-1) if ordered.is_contiguous() else None


def same_layout(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors of one shape keep their elements in the same order in memory.

    Args:
        first: any tensor.
        second: a tensor of the same shape; dimensions of size 1 may differ in stride.

    Returns:
        True where equal indices lie at equal distances from the first element.

    Example:
        >>> same_layout(torch.empty(2, 3), torch.empty(3, 2).t())
        False
    """
    return all(
        size == 1 or stride == other
        for size, stride, other in zip(first.shape, first.stride(), second.stride(), strict=True)
    )


def check_weight(weight: float | Tensor) -> None:
    """Refuse a weight that is no weight of an average.

    Args:
        weight: a number, or a tensor, whose value is not read.

    Raises:
        ValueError: a number outside [0, 1] or NaN; a tensor that is not 0-dimensional or not floating.
        TypeError: anything else.
    """
    if isinstance(weight, Tensor):
        if weight.dim() != 0 or not weight.is_floating_point():
            raise ValueError(
                "weight must be a float or a 0-dimensional floating tensor, "
                f"got {weight.dtype} of shape {tuple(weight.shape)}"
            )
    elif not isinstance(weight, Real):
        raise TypeError(f"weight must be a float or a 0-dimensional floating tensor, got {type(weight).__name__}")
    elif not 0.0 <= float(weight) <= 1.0:
        raise ValueError(f"weight must be in [0, 1], got {weight}")


def check_lerp(averages: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Refuse lists that `lerp_` can't update right, before anything is written.

    Args:
        averages: the tensors to be written.
        sources: the tensors to be read; one for each average, of the same shape.

    Raises:
        ValueError: names the first pair that differs in number or shape, or whose memory overlaps.
        TypeError: names the first tensor that is not of a supported floating dtype.
    """
    check_shapes(averages, sources)
    for kind, tensors in (("averages", averages), ("sources", sources)):
        for index, tensor in enumerate(tensors):
            if tensor.dtype not in FLOAT_DTYPES:
                raise TypeError(
                    f"{kind}[{index}] is {tensor.dtype}; lerp_ takes float32, bfloat16, float16 and float64. "
                    "View a complex tensor with torch.view_as_real, copy an integer tensor with copy_."
                )
    check_overlap(averages, sources)


def check_shapes(averages: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Refuse lists of different length, tensors of different shape, and tensors without memory.

    Raises:
        ValueError: names the first difference.
    """
    if len(averages) != len(sources):
        raise ValueError(f"{len(averages)} averages but {len(sources)} sources; give one source for each average")
    for index, (average, source) in enumerate(zip(averages, sources, strict=True)):
        if average.shape != source.shape:
            raise ValueError(
                f"averages[{index}] has shape {tuple(average.shape)} but sources[{index}] has "
                f"{tuple(source.shape)}; shapes must be equal, nothing is broadcast"
            )
        if average.is_meta or source.is_meta:
            raise ValueError(f"averages[{index}] or sources[{index}] is on the meta device and holds no values")
        if average.is_neg() or average.is_conj():
            raise ValueError(f"averages[{index}] is a negated or conjugated view; resolve it first")


def check_overlap(averages: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Refuse memory that is written and also read or written as another tensor.

    A pair listed twice (a tied weight under two names) is no overlap: `distinct` drops its second mention.

    Raises:
        ValueError: names the two tensors that overlap, or one that overlaps itself.
    """
    kept = [index for index in distinct(averages, sources) if averages[index].numel()]
    if not kept:
        return
    for index in kept:
        start, end = _extent(averages[index])
        if end - start < averages[index].nbytes:
            raise ValueError(f"averages[{index}] overlaps itself in memory, as expanded tensors do")
    written = np.array([_extent(averages[index]) for index in kept], dtype=np.int64)
    read = np.array([_extent(sources[index]) for index in kept], dtype=np.int64)
    order = np.argsort(written[:, 0], kind="stable")
    starts, ends = written[order, 0], written[order, 1]
    clash = np.flatnonzero(ends[:-1] > starts[1:])
    if clash.size:
        first, second = (kept[order[clash[0] + step]] for step in (0, 1))
        raise ValueError(f"averages[{first}] and averages[{second}] overlap in memory; each average needs its own")
    # Disjoint and sorted: the only average that can reach into a source is the first that ends past its start.
    candidate = np.searchsorted(ends, read[:, 0], side="right")
    inside = candidate < len(starts)
    inside[inside] = starts[candidate[inside]] < read[inside, 1]
    if inside.any():
        index = int(np.flatnonzero(inside)[0])
        raise ValueError(
            f"sources[{kept[index]}] overlaps averages[{kept[order[candidate[index]]]}] in memory; "
            "average into a copy of the weights, not into the weights themselves"
        )


def distinct(averages: Sequence[Tensor], sources: Sequence[Tensor]) -> list[int]:
    """The indices of the pairs that remain when a pair of the same two memories is listed again.

    Args:
        averages: the tensors to be written.
        sources: one for each average.

    Returns:
        Ascending indices, one for each pair of memories.

    Example:
        >>> a, p = torch.zeros(3), torch.ones(3)
        >>> distinct([a, a], [p, p])
        [0]
    """
    seen: dict[tuple[object, ...], int] = {}
    for index, (average, source) in enumerate(zip(averages, sources, strict=True)):
        key = (average.data_ptr(), average.shape, average.stride(), source.data_ptr(), source.stride())
        seen.setdefault(key if average.numel() else (index,), index)
    return list(seen.values())


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The addresses of the first byte of a tensor and of the byte after its last."""
    start = tensor.data_ptr()
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (reach + 1) * tensor.element_size()
