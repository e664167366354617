"""The update of averages, prepared once and launched each step."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from .average_kernel import Launch, specialisation
from .pairs import FLOAT_DTYPES, check_lerp, check_overlap, check_shapes, check_weight, dense_view, distinct
from .table import LaunchConfig, build, layout_refusal, refusal


class LerpTable:
    r"""A prepared `lerp_` over fixed tensors, to be launched again and again.

    .. math:: a_i \leftarrow a_i + w (p_i - a_i), \qquad t_j \leftarrow s_j

    One launch for each device and pair of dtypes; the copies travel in the first launch of their device. The table
    holds addresses: keep the tensors alive, and make a new table when one of them gets new memory.

    Args:
        averages: CUDA tensors of float32, bfloat16, float16 or float64, dense in memory; written.
        sources: one for each average, of its shape, strides and device; any of those dtypes; read.
        copy_to: tensors of any dtype (integer buffers), dense in memory, to be overwritten.
        copy_from: one for each of `copy_to`, of its shape, strides, dtype and device.
        config: the launch's shape; chosen from the number of elements where left out.

    Raises:
        ValueError: names the first tensor that can't take part, with the reason.
        TypeError: names the first average or source of another dtype.

    Example:
        >>> model = torch.nn.Linear(8, 8, device="cuda")
        >>> averages = [parameter.detach().clone() for parameter in model.parameters()]
        >>> table = LerpTable(averages, [parameter.detach() for parameter in model.parameters()])
        >>> table.lerp_(0.001)  # after each optimizer.step()
    """

    def __init__(
        self,
        averages: Sequence[Tensor],
        sources: Sequence[Tensor],
        copy_to: Sequence[Tensor] = (),
        copy_from: Sequence[Tensor] = (),
        config: LaunchConfig | None = None,
    ) -> None:
        check_lerp(averages, sources)
        check_shapes(copy_to, copy_from)
        check_overlap([*averages, *copy_to], [*sources, *copy_from])
        _check_layout("averages", averages, sources)
        _check_layout("copy_to", copy_to, copy_from)
        for index, (target, source) in enumerate(zip(copy_to, copy_from, strict=True)):
            if target.dtype != source.dtype:
                raise ValueError(
                    f"copy_to[{index}] is {target.dtype} but copy_from[{index}] {source.dtype}; copies keep the dtype"
                )
        self._launches = _plan(averages, sources, copy_to, copy_from, config)

    @property
    def launches(self) -> int:
        """How many kernels one call of `lerp_` launches."""
        return len(self._launches)

    def lerp_(self, weight: float | Tensor) -> None:
        """Launch the update.

        Args:
            weight: in [0, 1]: a float, or a 0-dimensional floating tensor on the averages' device, read there by the
                kernel (so that a captured CUDA graph follows it).

        Raises:
            ValueError: a weight outside [0, 1] or NaN, or a weight tensor that is not 0-dimensional.
        """
        check_weight(weight)
        for launch in self._launches:
            launch.run(weight)


@torch.no_grad()
def lerp_(averages: Sequence[Tensor], sources: Sequence[Tensor], weight: float | Tensor) -> None:
    r"""Move each average towards its source, in place, in one launch for each device and pair of dtypes.

    .. math:: a \leftarrow a + w (p - a)

    `fastswa_kernels.reference.lerp_` is the specification. The table of the last few lists is kept by address, so a
    training loop that calls this each step builds it once; a `LerpTable` that the caller keeps is quicker still.

    Args:
        averages: CUDA tensors of float32, bfloat16, float16 or float64; any shape and offset; written. The same pair
            listed twice is updated once. One with gaps between its elements is updated through a dense copy.
        sources: one for each average, of the same shape; any of those dtypes. A source with other strides or on
            another device is first copied into the average's layout.
        weight: in [0, 1]: a float, or a 0-dimensional floating tensor on the averages' device.

    Raises:
        ValueError: lists of different length, shapes that differ, memory that overlaps, a weight outside [0, 1].
        TypeError: a dtype that is not one of the four. Nothing has been written in any of these cases.

    Example:
        >>> average = [torch.zeros(1000, device="cuda")]
        >>> lerp_(average, [torch.ones(1000, device="cuda")], 0.25)

    References:
        Izmailov et al. 2018, Averaging Weights Leads to Wider Optima and Better Generalization, Algorithm 1.
    """
    check_weight(weight)
    check_shapes(averages, sources)
    targets, origins = list(averages), list(sources)
    for index, (average, source) in enumerate(zip(averages, sources, strict=True)):
        if average.dtype in FLOAT_DTYPES and dense_view(average) is None:
            targets[index] = average.contiguous()
        if source.dtype in FLOAT_DTYPES and layout_refusal(targets[index], source):
            origins[index] = torch.empty_like(targets[index], dtype=source.dtype).copy_(source)

    key = tuple((t.data_ptr(), t.dtype, t.shape, t.stride(), t.device) for t in (*targets, *origins))
    launches = _recent.get(key)
    if launches is None:
        check_lerp(averages, sources)
        launches = _recent[key] = LerpTable(targets, origins)._launches
        if len(_recent) > 8:
            _recent.popitem(last=False)
    _recent.move_to_end(key)
    for launch in launches:
        launch.run(weight)
    for average, target in zip(averages, targets, strict=True):
        if target is not average:
            average.copy_(target)


_recent: OrderedDict[tuple[object, ...], list[Launch]] = OrderedDict()


def _plan(
    averages: Sequence[Tensor],
    sources: Sequence[Tensor],
    copy_to: Sequence[Tensor],
    copy_from: Sequence[Tensor],
    config: LaunchConfig | None,
) -> list[Launch]:
    lerps: dict[tuple[torch.device, torch.dtype, torch.dtype], list[int]] = {}
    for index in distinct(averages, sources):
        if averages[index].numel():
            key = (averages[index].device, averages[index].dtype, sources[index].dtype)
            lerps.setdefault(key, []).append(index)
    copies: dict[torch.device, list[int]] = {}
    for index in distinct(copy_to, copy_from):
        if copy_to[index].numel():
            copies.setdefault(copy_to[index].device, []).append(index)
    for device in copies:
        if not any(device == key[0] for key in lerps):
            lerps[device, torch.float32, torch.float32] = []

    launches = []
    for (device, average, source), members in lerps.items():
        riders = copies.pop(device, [])
        chosen = config or LaunchConfig.for_elements(sum(averages[index].numel() for index in members))
        table, lerp_rows = build(
            [averages[index] for index in members],
            [sources[index] for index in members],
            [copy_to[index] for index in riders],
            [copy_from[index] for index in riders],
            chosen,
        )
        constants = dict(specialisation(average, source), BLOCK=chosen.block)
        launches.append(Launch(table, lerp_rows, chosen.grid(len(table), device), constants, chosen.num_warps))
    return launches


def _check_layout(name: str, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    for index, (target, source) in enumerate(zip(targets, sources, strict=True)):
        reason = refusal(target.device) or layout_refusal(target, source)
        if reason:
            raise ValueError(f"{name}[{index}]: {reason}")
