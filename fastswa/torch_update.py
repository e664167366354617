"""The update in plain torch: the CPU's path, and every device's where Triton can't run.

A CPU spends about a microsecond to reach one tensor and half a nanosecond to average one element of it, so a small
tensor costs more to reach than to average. Neighbours in a flat buffer are therefore gathered by `torch.cat` and
averaged by one `lerp_`, which is also long enough to use every thread; large tensors go to `torch._foreach_lerp_`.
Where the dtypes differ, which no torch operation averages, the source is converted in pieces that stay in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastswa.flat import FlatBuffers
from fastswa_kernels import reference
from fastswa_kernels.pairs import dense_view, same_layout

SMALL = 8192
"""Elements up to which a tensor is gathered; larger ones are quicker reached by themselves."""

GATHER = 32767
"""Elements of one torch.cat. From 32768 on it hands its sources to threads, at the price of a dispatch for each."""

GATHERED = 1 << 18
"""Elements averaged at once after gathering: 1 MB of float32, half of which still fits each core's cache."""

PIECE = {"cpu": 1 << 20}
"""Elements converted at once: on a CPU 4 MB of float32, in the cache, and enough to pay for the threads' start."""

_SAME_SIZE_FLOAT = {8: torch.float64, 4: torch.float32, 2: torch.float16}


@dataclass(frozen=True)
class _Gather:
    """Sources to be laid end to end, and where."""

    pieces: list[Tensor]
    out: Tensor

    def run(self) -> None:
        torch.cat(self.pieces, out=self.out)


@dataclass(frozen=True)
class _Blend:
    """One average and one source, with room to convert whichever is narrower than the arithmetic."""

    average: Tensor
    source: Tensor
    wide_average: Tensor | None
    wide_source: Tensor | None
    before: Sequence[_Gather] = ()

    def lerp_(self, weight: float) -> None:
        for gather in self.before:
            gather.run()
        source = self.source if self.wide_source is None else self.wide_source.copy_(self.source)
        if self.wide_average is None:
            self.average.lerp_(source, weight)
        else:
            self.average.copy_(self.wide_average.copy_(self.average).lerp_(source, weight))


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
        self._scratch: dict[tuple[torch.dtype, str], Tensor] = {}
        self._blends: list[_Blend] = []
        runs, alone = _runs(averages, sources, flat)
        for target, members in runs:
            packed = self._room(members[0].dtype, "packed", target)
            self._blends.append(self._blend(target, packed, list(_gathers(members, packed))))

        self._foreach: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        for average, source in ((averages[index], sources[index]) for index in alone):
            if average.dtype == source.dtype:
                to, origin = self._foreach.setdefault(average.dtype, ([], []))
                to.append(average)
                origin.append(source)
            else:
                self._blends += [self._blend(*piece) for piece in _pieces(average, source)]

        runs, alone = _runs(copy_to, copy_from, flat, keep_dtype=True)
        self._copies = [gather for target, members in runs for gather in _gathers(_bits(members), *_bits([target]))]
        self._copy_to = [copy_to[index] for index in alone]
        self._copy_from = [copy_from[index] for index in alone]

    def lerp_(self, weight: float | Tensor) -> None:
        """Run the update. The caller has turned gradients off.

        Args:
            weight: in [0, 1]: a float, or a 0-dimensional tensor, which is read by the host only if it is on the CPU.
        """
        if isinstance(weight, Tensor) and weight.device.type == "cpu":
            weight = float(weight)
        if isinstance(weight, Tensor):
            reference.lerp_(self._averages, self._sources, weight)
        elif weight == 1:
            # Not lerp_: 0 * NaN would keep a NaN that the average held.
            torch._foreach_copy_(self._averages, self._sources)
        else:
            for blend in self._blends:
                blend.lerp_(weight)
            for averages, sources in self._foreach.values():
                torch._foreach_lerp_(averages, sources, weight)
        for gather in self._copies:
            gather.run()
        if self._copy_to:
            torch._foreach_copy_(self._copy_to, self._copy_from)

    def _blend(self, average: Tensor, source: Tensor, before: Sequence[_Gather] = ()) -> _Blend:
        compute = torch.promote_types(average.dtype, source.dtype)
        return _Blend(
            average,
            source,
            None if average.dtype == compute else self._room(compute, "average", average),
            None if source.dtype == compute else self._room(compute, "source", average),
            before,
        )

    def _room(self, dtype: torch.dtype, use: str, like: Tensor) -> Tensor:
        """Scratch of a tensor's shape. Steps run one after another, so each use has one memory for all steps."""
        if like.dim() != 1:
            return torch.empty_like(like, dtype=dtype)
        room = self._scratch.get((dtype, use))
        if room is None or len(room) < len(like):
            room = self._scratch[dtype, use] = torch.empty_like(like, dtype=dtype)
        return room[: len(like)]


def _pieces(average: Tensor, source: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Cut a pair into one-dimensional pieces that fit the cache, or leave it whole where its layout forbids."""
    to, origin = dense_view(average), dense_view(source)
    if to is None or origin is None or not same_layout(average, source):
        return [(average, source)]
    size = PIECE.get(average.device.type, 1 << 24)
    return list(zip(torch.split(to, size), torch.split(origin, size), strict=True))


def _runs(
    targets: Sequence[Tensor], sources: Sequence[Tensor], flat: FlatBuffers | None, keep_dtype: bool = False
) -> tuple[list[tuple[Tensor, list[Tensor]]], list[int]]:
    """Sort pairs into runs of small neighbours (their stretch of buffer, their sources) and the indices of the rest."""
    if flat is None:
        return [], list(range(len(targets)))
    groups: list[list[int]] = []
    rest: list[int] = []
    size = 0
    for index, (target, source) in enumerate(zip(targets, sources, strict=True)):
        if not _small(target, source) or (keep_dtype and target.dtype != source.dtype):
            rest.append(index)
            continue
        last = groups[-1][-1] if groups else None
        size += target.numel()
        if (
            last is None
            or size > GATHERED
            or source.dtype != sources[last].dtype
            or not flat.adjacent(targets[last], target)
        ):
            groups.append([])
            size = target.numel()
        groups[-1].append(index)
    runs = []
    for group in groups:
        if len(group) == 1:
            rest += group
        else:
            runs.append((flat.span(targets[group[0]], targets[group[-1]]), [sources[index] for index in group]))
    return runs, sorted(rest)


def _small(target: Tensor, source: Tensor) -> bool:
    return (
        target.device.type == "cpu"
        and source.device.type == "cpu"
        and 0 < target.numel() <= SMALL
        and same_layout(target, source)
        and dense_view(source) is not None
    )


def _gathers(sources: Sequence[Tensor], out: Tensor) -> Iterator[_Gather]:
    """Lay sources end to end into `out`, in as few gatherings as stay quick."""
    pieces: list[Tensor] = []
    start = end = 0
    for source in sources:
        piece = source if source.dim() == 1 and source.is_contiguous() else dense_view(source)
        assert piece is not None  # _small saw to it
        if end + len(piece) - start > GATHER:
            yield _Gather(pieces, out[start:end])
            pieces, start = [], end
        pieces.append(piece)
        end += len(piece)
    yield _Gather(pieces, out[start:end])


def _bits(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Integer tensors as floating ones of the same bits: torch.cat has its tight loop for floating dtypes only."""
    same_size = _SAME_SIZE_FLOAT.get(tensors[0].element_size())
    if same_size is None or tensors[0].is_floating_point():
        return list(tensors)
    return [tensor.view(same_size) for tensor in tensors]
