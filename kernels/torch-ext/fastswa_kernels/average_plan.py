"""From lists of tensors to the launches that update them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from .average_launch import MOST_AVERAGES, Launch, specialisation
from .pairs import check_multi_lerp, check_shapes, dense_like, dense_view, distinct, list_name, same_layout
from .rounding import StochasticRounding
from .table import LaunchConfig, build, layout_refusal, refusal


def plan(
    averages: Sequence[Sequence[Tensor]],
    sources: Sequence[Tensor],
    copy_to: Sequence[Tensor] = (),
    copy_from: Sequence[Tensor] = (),
    config: LaunchConfig | None = None,
    single: bool = False,
    first_elements: Sequence[int] | None = None,
) -> list[Launch]:
    """Check lists of tensors and build the tables of their launches.

    Args:
        averages: lists of the tensors to be written, as `MultiLerpTable` takes them.
        sources: one for each average of a list; read.
        copy_to: tensors to be overwritten, in the first launch of their device.
        copy_from: one for each of `copy_to`.
        config: the launches' shape; chosen from the number of elements where left out.
        single: the only list is that of `lerp_`: named averages[i], and written even where its weight is 0.
        first_elements: for each source the number of its first element, for random bits; where the one before ends, if
            left out.

    Returns:
        A launch for each device and pair of dtypes; as many as needed where more averages follow a source than fit
        into one.

    Raises:
        ValueError: names the first tensor that can't take part, with the reason.
        TypeError: names the first average or source of another dtype.
    """
    check_multi_lerp(averages, sources, copy_to, copy_from, single)
    for k, tensors in enumerate(averages):
        _check_layout(list_name(k, single), tensors, sources)
    _check_layout("copy_to", copy_to, copy_from)
    for index, (target, source) in enumerate(zip(copy_to, copy_from, strict=True)):
        if target.dtype != source.dtype:
            raise ValueError(
                f"copy_to[{index}] is {target.dtype} but copy_from[{index}] {source.dtype}; copies keep the dtype"
            )

    members_of: dict[tuple[torch.device, torch.dtype, torch.dtype], list[int]] = {}
    for index in distinct(*averages, sources):
        if sources[index].numel():
            key = (sources[index].device, averages[0][index].dtype, sources[index].dtype)
            members_of.setdefault(key, []).append(index)
    copies: dict[torch.device, list[int]] = {}
    for index in distinct(copy_to, copy_from):
        if copy_to[index].numel():
            copies.setdefault(copy_to[index].device, []).append(index)
    for device in copies:
        if not any(device == key[0] for key in members_of):
            members_of[device, torch.float32, torch.float32] = []

    if first_elements is None:
        first_elements = list(accumulate((source.numel() for source in sources), initial=0))
    launches = []
    for (device, average_dtype, source_dtype), members in members_of.items():
        for first in range(0, len(averages) if members else 1, MOST_AVERAGES):
            riders = copies.pop(device, [])
            moved = averages[first : first + MOST_AVERAGES]
            elements = sum(sources[index].numel() for index in members)
            wide = torch.float64 in (average_dtype, source_dtype)
            chosen = config or LaunchConfig.for_elements(elements, len(moved), wide)
            table, lerp_rows = build(
                [[tensors[index] for index in members] for tensors in moved],
                [sources[index] for index in members],
                [first_elements[index] for index in members],
                [copy_to[index] for index in riders],
                [copy_from[index] for index in riders],
                chosen,
            )
            constants = dict(specialisation(average_dtype, source_dtype), BLOCK=chosen.block, IDLE_AT_ZERO=not single)
            grid = chosen.grid(len(table), device)
            launches.append(Launch(table, lerp_rows, grid, first, len(moved), constants, chosen.num_warps))
    return launches


def update(
    averages: Sequence[Sequence[Tensor]],
    sources: Sequence[Tensor],
    weights: Sequence[float] | Tensor,
    rounding: StochasticRounding | None = None,
    skip: Tensor | None = None,
    single: bool = False,
) -> None:
    """Update lists that are known only for this call; the launches of the last few lists are kept by address.

    Args:
        averages: lists of tensors of any strides; those that a kernel can't walk are updated through dense copies.
        sources: one for each average of a list; on any device.
        weights: one for each list.
        rounding: of bfloat16 and float16 averages.
        skip: a flag of one element.
        single: as `plan` takes it.

    Raises:
        ValueError: as `plan` raises it.
        TypeError: as `plan` raises it.
    """
    for k, tensors in enumerate(averages):
        check_shapes(tensors, sources, list_name(k, single))
    targets, origins, back = _staged(averages, sources)
    given = [tensor for tensors in (*averages, sources) for tensor in tensors]
    copies = [copy for tensors in (*targets, origins) for copy in tensors]
    staged = [copy for tensor, copy in zip(given, copies, strict=True) if copy is not tensor]
    key = (single, len(averages), *((t.data_ptr(), t.dtype, t.shape, t.stride(), t.device) for t in (*given, *staged)))
    launches = _recent.get(key)
    if launches is None:
        # The copies overlap nothing, so the lists themselves are checked too.
        check_multi_lerp(averages, sources, single=single)
        launches = _recent[key] = plan(targets, origins, single=single)
        if len(_recent) > 8:
            _recent.popitem(last=False)
    _recent.move_to_end(key)
    for launch in launches:
        launch.run(weights, rounding, skip)
    for average, copy in back:
        average.copy_(copy)


_recent: OrderedDict[tuple[object, ...], list[Launch]] = OrderedDict()


def _staged(
    averages: Sequence[Sequence[Tensor]], sources: Sequence[Tensor]
) -> tuple[list[list[Tensor]], list[Tensor], list[tuple[Tensor, Tensor]]]:
    """The lists with dense copies, in the order of each first average, of what a kernel can't walk in that order."""
    targets, origins = [list(tensors) for tensors in averages], list(sources)
    back = []
    for index, source in enumerate(sources):
        for tensors in targets:
            average, order = tensors[index], targets[0][index]
            if dense_view(average) is None or not (average is order or same_layout(average, order)):
                tensors[index] = dense_like(order, average.dtype).copy_(average)
                back.append((average, tensors[index]))
        if targets and layout_refusal(targets[0][index], source):
            origins[index] = dense_like(targets[0][index], source.dtype).copy_(source)
    return targets, origins, back


def _check_layout(name: str, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    for index, (target, source) in enumerate(zip(targets, sources, strict=True)):
        reason = refusal(target.device) or layout_refusal(target, source)
        if reason:
            raise ValueError(f"{name}[{index}]: {reason}")
