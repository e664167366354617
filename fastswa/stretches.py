"""How tensors are cut up for the update in plain torch: small ones gathered, large ones in pieces that fit the cache.

A CPU spends about a microsecond to reach one tensor and half a nanosecond to average one element of it, so a small
tensor costs more to reach than to average. Neighbours in a flat buffer are therefore gathered by `torch.cat` and
averaged as one, which is also long enough to use every thread.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastswa.flat import FlatBuffers
from fastswa_kernels.pairs import dense_view, same_layout

SMALL = 2048
"""Elements up to which a tensor is gathered; larger ones are quicker reached by themselves."""

GATHER = 32767
"""Elements of one torch.cat. From 32768 on it hands its sources to threads, at the price of a dispatch for each."""

GATHERED = 1 << 18
"""Elements averaged at once after gathering: 1 MB of float32, half of which still fits each core's cache."""

PIECE = {"cpu": 1 << 18}
"""Elements taken at once: on a CPU 1 MB of float32, which a core's cache holds, and enough for the threads' start."""

_SAME_SIZE_FLOAT = {8: torch.float64, 4: torch.float32, 2: torch.float16}


@dataclass(frozen=True)
class Gather:
    """Sources to be laid end to end, and where.

    Args:
        pieces: one-dimensional tensors of one dtype.
        out: as long as they are together.
    """

    pieces: list[Tensor]
    out: Tensor

    def run(self) -> None:
        """Lay the sources' present values there."""
        torch.cat(self.pieces, out=self.out)


class Scratch:
    """Memory for values on their way. Steps run one after another, so each use has one memory for all steps."""

    def __init__(self) -> None:
        self._memory: dict[tuple[torch.dtype, str], Tensor] = {}

    def room(self, dtype: torch.dtype, use: str, like: Tensor) -> Tensor:
        """A tensor of another's shape and memory order.

        Args:
            dtype: of the room.
            use: what it is for; rooms of one dtype and use share their memory.
            like: whose shape it has.
        """
        return self.rooms(dtype, use, [like])[0]

    def rooms(self, dtype: torch.dtype, use: str, likes: Sequence[Tensor]) -> list[Tensor]:
        """Rooms that are used together.

        Args:
            dtype: of the rooms.
            use: what they are for; others of that dtype and use share their memory.
            likes: whose shapes they have; all or none of one dimension.
        """
        if likes[0].dim() != 1:
            return [torch.empty_like(like, dtype=dtype) for like in likes]
        sizes = list(map(len, likes))
        memory = self._memory.get((dtype, use))
        if memory is None or len(memory) < sum(sizes):
            memory = self._memory[dtype, use] = torch.empty(sum(sizes), dtype=dtype, device=likes[0].device)
        return list(torch.split(memory[: sum(sizes)], sizes))


def pieces(average: Tensor, source: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Cut a pair into one-dimensional pieces that fit the cache, or leave it whole where its layout forbids.

    Args:
        average: to be written.
        source: of its shape.

    Returns:
        Pairs of views, in the order of memory.
    """
    to, origin = dense_view(average), dense_view(source)
    if to is None or origin is None or not same_layout(average, source):
        return [(average, source)]
    size = piece_size(average)
    return list(zip(torch.split(to, size), torch.split(origin, size), strict=True))


def piece_size(tensor: Tensor) -> int:
    """How many elements are taken at once.

    Args:
        tensor: on the device on which they are.
    """
    return PIECE.get(tensor.device.type, 1 << 24)


def groups(
    targets: Sequence[Tensor], sources: Sequence[Tensor], flat: FlatBuffers | None, keep_dtype: bool = False
) -> tuple[list[list[int]], list[int]]:
    """Sort pairs into runs of small neighbours and the rest.

    Args:
        targets: to be written.
        sources: one for each target.
        flat: the buffers in which the targets lie; None where they lie anywhere.
        keep_dtype: take no pair of different dtypes into a run.

    Returns:
        The indices of each run, of two pairs at least, and the indices of the rest.
    """
    if flat is None:
        return [], list(range(len(targets)))
    found: list[list[int]] = []
    rest: list[int] = []
    size = 0
    for index, (target, source) in enumerate(zip(targets, sources, strict=True)):
        if not _small(target, source) or (keep_dtype and target.dtype != source.dtype):
            rest.append(index)
            continue
        last = found[-1][-1] if found else None
        size += target.numel()
        if (
            last is None
            or size > GATHERED
            or source.dtype != sources[last].dtype
            or not flat.adjacent(targets[last], target)
        ):
            found.append([])
            size = target.numel()
        found[-1].append(index)
    rest += [group[0] for group in found if len(group) == 1]
    return [group for group in found if len(group) > 1], sorted(rest)


def gathers(sources: Sequence[Tensor], out: Tensor) -> Iterator[Gather]:
    """Lay sources end to end, in as few gatherings as stay quick.

    Args:
        sources: of a run.
        out: one-dimensional, as long as they are together.

    Yields:
        The gatherings that fill `out`.
    """
    parts: list[Tensor] = []
    start = end = 0
    for source in sources:
        part = source if source.dim() == 1 and source.is_contiguous() else dense_view(source)
        assert part is not None  # _small saw to it
        if end + len(part) - start > GATHER:
            yield Gather(parts, out[start:end])
            parts, start = [], end
        parts.append(part)
        end += len(part)
    yield Gather(parts, out[start:end])


def gathers_of_bits(sources: Sequence[Tensor], out: Tensor) -> Iterator[Gather]:
    """The same for a copy, with integers as floats of the same bits: torch.cat has its tight loop for floats only.

    Args:
        sources: of a run, of the dtype of `out`.
        out: one-dimensional, as long as they are together.

    Yields:
        The gatherings that fill `out`.
    """
    same_size = _SAME_SIZE_FLOAT.get(out.element_size())
    if same_size is None or out.is_floating_point():
        return gathers(sources, out)
    return gathers([source.view(same_size) for source in sources], out.view(same_size))


def _small(target: Tensor, source: Tensor) -> bool:
    return (
        target.device.type == "cpu"
        and source.device.type == "cpu"
        and 0 < target.numel() <= SMALL
        and same_layout(target, source)
        and dense_view(source) is not None
    )
