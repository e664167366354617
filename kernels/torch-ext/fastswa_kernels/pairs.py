"""What may be averaged with what: the checks shared by the kernels and by the reference."""

from __future__ import annotations

from collections.abc import Sequence

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


def dense_like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """An uninitialised dense tensor whose elements lie in the order of a tensor's, its gaps closed.

    Args:
        tensor: any shape, any strides.
        dtype: of the result.

    Returns:
        A tensor of that shape on that device; of the same strides, where those are dense.

    Example:
        >>> dense_like(torch.zeros(4, 6)[:, ::2], torch.float32).stride()
        (3, 1)
    """
    return torch.empty_like(tensor, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)


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
    return first.stride() == second.stride() or all(
        size == 1 or stride == other
        for size, stride, other in zip(first.shape, first.stride(), second.stride(), strict=True)
    )


def check_lerp(averages: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Refuse lists that `lerp_` can't update right, before anything is written.

    Args:
        averages: the tensors to be written.
        sources: the tensors to be read; one for each average, of the same shape.

    Raises:
        ValueError: names the first pair that differs in number or shape, or whose memory overlaps.
        TypeError: names the first tensor that is not of a supported floating dtype.
    """
    check_multi_lerp([averages], sources, single=True)


def check_multi_lerp(
    averages: Sequence[Sequence[Tensor]],
    sources: Sequence[Tensor],
    copy_to: Sequence[Tensor] = (),
    copy_from: Sequence[Tensor] = (),
    single: bool = False,
) -> None:
    """Refuse lists that `multi_lerp_` can't update right, before anything is written.

    Args:
        averages: lists of the tensors to be written.
        sources: the tensors to be read; one for each average of a list, of the same shape.
        copy_to: tensors to be overwritten.
        copy_from: one for each of `copy_to`, of its shape.
        single: name the tensors of the only list averages[i], not averages[0][i].

    Raises:
        ValueError: names the first tensor that differs in number or shape, or whose memory overlaps another's; or the
            first average whose dtype or device is not that of its source's other averages.
        TypeError: names the first tensor that is not of a supported floating dtype.
    """
    if not averages:
        raise ValueError("no list of averages; give at least one")
    names = [list_name(k, single) for k in range(len(averages))]
    for name, tensors in zip(names, averages, strict=True):
        check_shapes(tensors, sources, name)
    check_shapes(copy_to, copy_from, "copy_to", "copy_from")
    for name, tensors in (*zip(names, averages, strict=True), ("sources", sources)):
        check_floating(name, tensors, "lerp_")
    for name, tensors in zip(names, averages, strict=True):
        for index, (tensor, first) in enumerate(zip(tensors, averages[0], strict=True)):
            if (tensor.dtype, tensor.device) != (first.dtype, first.device):
                raise ValueError(
                    f"{name}[{index}] is {tensor.dtype} on {tensor.device} but {names[0]}[{index}] {first.dtype} on "
                    f"{first.device}; all averages of one source have one dtype and device"
                )
    written = [
        (f"{name}[{index}]", tensors[index])
        for index in distinct(*averages, sources)
        for name, tensors in zip(names, averages, strict=True)
    ]
    read = [(f"sources[{index}]", sources[index]) for index in distinct(*averages, sources)]
    for index in distinct(copy_to, copy_from):
        written.append((f"copy_to[{index}]", copy_to[index]))
        read.append((f"copy_from[{index}]", copy_from[index]))
    check_disjoint(written, read, "average into a copy of the weights, not into the weights themselves")


def check_floating(name: str, tensors: Sequence[Tensor], function: str) -> None:
    """Refuse dtypes that no kernel computes with.

    Args:
        name: what messages call the list.
        tensors: of the list.
        function: what it was given to.

    Raises:
        TypeError: names the first tensor that is not of a supported floating dtype.
    """
    for index, tensor in enumerate(tensors):
        if tensor.dtype not in FLOAT_DTYPES:
            raise TypeError(
                f"{name}[{index}] is {tensor.dtype}; {function} takes float32, bfloat16, float16 and float64. "
                "View a complex tensor with torch.view_as_real, copy an integer tensor with copy_."
            )


def list_name(k: int, single: bool) -> str:
    """What messages call the list of averages number `k`, or the only one."""
    return "averages" if single else f"averages[{k}]"


def check_shapes(
    averages: Sequence[Tensor], sources: Sequence[Tensor], name: str = "averages", source_name: str = "sources"
) -> None:
    """Refuse lists of different length, tensors of different shape, and tensors without memory.

    Raises:
        ValueError: names the first difference.
    """
    if len(averages) != len(sources):
        raise ValueError(f"{len(averages)} {name} but {len(sources)} {source_name}; give one for each")
    for index, (average, source) in enumerate(zip(averages, sources, strict=True)):
        if average.shape != source.shape:
            raise ValueError(
                f"{name}[{index}] has shape {tuple(average.shape)} but {source_name}[{index}] has "
                f"{tuple(source.shape)}; shapes must be equal, nothing is broadcast"
            )
        if average.is_meta or source.is_meta:
            raise ValueError(f"{name}[{index}] or {source_name}[{index}] is on the meta device and holds no values")
        if average.is_neg() or average.is_conj():
            raise ValueError(f"{name}[{index}] is a negated or conjugated view; resolve it first")


def check_disjoint(written: Sequence[tuple[str, Tensor]], read: Sequence[tuple[str, Tensor]], advice: str) -> None:
    """Refuse memory that is written and also read or written as another tensor.

    Args:
        written: names and tensors.
        read: names and tensors; without those that may share a written tensor's memory.
        advice: what to do where memory is both written and read.

    Raises:
        ValueError: names the first two that overlap, or a written tensor that overlaps itself.
    """
    written, read = [[named for named in tensors if named[1].numel()] for tensors in (written, read)]
    if not written:
        return
    for name, tensor in written:
        start, end = _extent(tensor)
        if end - start < tensor.nbytes:
            raise ValueError(f"{name} overlaps itself in memory, as expanded tensors do")
    to = np.array([_extent(tensor) for _, tensor in written], dtype=np.int64)
    origin = np.array([_extent(tensor) for _, tensor in read], dtype=np.int64)
    order = np.argsort(to[:, 0], kind="stable")
    starts, ends = to[order, 0], to[order, 1]
    clash = np.flatnonzero(ends[:-1] > starts[1:])
    if clash.size:
        first, second = (written[order[clash[0] + step]][0] for step in (0, 1))
        raise ValueError(f"{first} and {second} overlap in memory; each needs its own")
    # Disjoint and sorted: the only average that can reach into a source is the first that ends past its start.
    candidate = np.searchsorted(ends, origin[:, 0], side="right")
    inside = candidate < len(starts)
    inside[inside] = starts[candidate[inside]] < origin[inside, 1]
    if inside.any():
        index = int(np.flatnonzero(inside)[0])
        raise ValueError(f"{read[index][0]} overlaps {written[order[candidate[index]]][0]} in memory; {advice}")


def distinct(*lists: Sequence[Tensor]) -> list[int]:
    """The indices that remain when tensors of the same memories are listed again (a tied weight under two names).

    Args:
        lists: of averages and of their sources, of one length.

    Returns:
        Ascending indices, one for each pair, or tuple, of memories.

    Example:
        >>> a, p = torch.zeros(3), torch.ones(3)
        >>> distinct([a, a], [p, p])
        [0]
    """
    if len({tensor.data_ptr() for tensor in lists[0]}) == len(lists[0]):
        return list(range(len(lists[0])))
    seen: dict[tuple[object, ...], int] = {}
    for index, tensors in enumerate(zip(*lists, strict=True)):
        key = (tensors[0].shape, *((tensor.data_ptr(), tensor.stride()) for tensor in tensors))
        seen.setdefault(key if tensors[0].numel() else (index,), index)
    return list(seen.values())


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The addresses of the first byte of a tensor and of the byte after its last."""
    start = tensor.data_ptr()
    if tensor.is_contiguous():
        return start, start + tensor.nbytes
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (reach + 1) * tensor.element_size()
