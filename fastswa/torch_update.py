"""The update in plain torch: the CPU's path, and every device's where Triton can't run.

Small neighbours of a flat buffer are gathered and averaged as one; large tensors go to torch's operations on lists.
Where the dtypes differ, which no torch operation averages, the source is converted in pieces that stay in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastswa import stretches
from fastswa.flat import FlatBuffers
from fastswa.torch_lerp import Lerp, in_memory_order, quickest
from fastswa_kernels import reference


@dataclass(frozen=True)
class _Blend:
    """One average and one source, with room to convert whichever is narrower than the arithmetic."""

    average: Tensor
    source: Tensor
    wide_average: Tensor | None
    wide_source: Tensor | None
    operation: Lerp
    before: Sequence[stretches.Gather] = ()

    def lerp_(self, weight: float) -> None:
        for gather in self.before:
            gather.run()
        source = self.source if self.wide_source is None else self.wide_source.copy_(self.source)
        if self.wide_average is None:
            self.operation([self.average], [source], weight)
        else:
            self.operation([self.wide_average.copy_(self.average)], [source], weight)
            self.average.copy_(self.wide_average)


class TorchUpdate:
    r"""A prepared update over fixed tensors.

    .. math:: a_i \leftarrow a_i + w (p_i - a_i), \qquad t_j \leftarrow s_j

    Args:
        averages: floating tensors on one device; written.
        sources: one for each average, on that device; any floating dtype; read.
        copy_to: tensors of any dtype on that device, to be overwritten.
        copy_from: one for each of `copy_to`; any device and dtype.
        flat: the buffers in which `averages` and `copy_to` lie; None where they lie anywhere.
    """

    def __init__(
        self,
        averages: Sequence[Tensor],
        sources: Sequence[Tensor],
        copy_to: Sequence[Tensor],
        copy_from: Sequence[Tensor],
        flat: FlatBuffers | None,
    ) -> None:
        self._averages, self._sources = list(averages), list(sources)
        self._scratch = stretches.Scratch()
        self._blends: list[_Blend] = []
        runs, alone = stretches.groups(averages, sources, flat)
        for target, members in _stretches(runs, averages, sources, flat):
            packed = self._scratch.room(members[0].dtype, "packed", target)
            self._blends.append(self._blend(target, packed, list(stretches.gathers(members, packed))))

        self._lists: dict[tuple[Lerp, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
        for average, source in ((averages[index], sources[index]) for index in alone):
            if average.dtype == source.dtype:
                average, source = in_memory_order(average, source)
                operation = quickest(average, source, average.dtype)
                to, origin = self._lists.setdefault((operation, average.dtype), ([], []))
                to.append(average)
                origin.append(source)
            else:
                self._blends += [self._blend(*piece) for piece in stretches.pieces(average, source)]

        runs, alone = stretches.groups(copy_to, copy_from, flat, keep_dtype=True)
        self._copies = [
            gather
            for target, members in _stretches(runs, copy_to, copy_from, flat)
            for gather in stretches.gathers_of_bits(members, target)
        ]
        self._copy_to = [copy_to[index] for index in alone]
        self._copy_from = [copy_from[index] for index in alone]

    # With gradients merely off, autograd still looks at each of the many tensors.
    @torch.inference_mode()
    def lerp_(self, weight: float | Tensor) -> None:
        """Run the update.

        Args:
            weight: in [0, 1]: a float, or a 0-dimensional tensor, which is read by the host only if it is on the CPU.
        """
        if isinstance(weight, Tensor) and weight.device.type == "cpu":
            weight = float(weight)
        if isinstance(weight, Tensor):
            reference.lerp_(self._averages, self._sources, weight)
        elif weight == 1:
            # Not lerp_: 0 * NaN would keep a NaN that the average held.
            if self._averages:
                torch._foreach_copy_(self._averages, self._sources)
        else:
            for blend in self._blends:
                blend.lerp_(weight)
            for (operation, _), (averages, sources) in self._lists.items():
                operation(averages, sources, weight)
        for gather in self._copies:
            gather.run()
        if self._copy_to:
            torch._foreach_copy_(self._copy_to, self._copy_from)

    def _blend(self, average: Tensor, source: Tensor, before: Sequence[stretches.Gather] = ()) -> _Blend:
        compute = torch.promote_types(average.dtype, source.dtype)
        wide_average = None if average.dtype == compute else self._scratch.room(compute, "average", average)
        wide_source = None if source.dtype == compute else self._scratch.room(compute, "source", average)
        return _Blend(average, source, wide_average, wide_source, quickest(average, source, compute), before)


def _stretches(
    runs: Sequence[Sequence[int]], targets: Sequence[Tensor], sources: Sequence[Tensor], flat: FlatBuffers | None
) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Each run's stretch of buffer, and its sources."""
    for run in runs:
        assert flat is not None  # groups() makes no runs without
        yield flat.span(targets[run[0]], targets[run[-1]]), [sources[index] for index in run]
