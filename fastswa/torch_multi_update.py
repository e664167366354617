"""Several averages of the same tensors in plain torch: each stretch of the sources is brought into the cache once.

The averages of one set after another would read every source K times from memory. Here a piece that fits the cache is
averaged into all K sets before the next is read: 8 K + 4 bytes an element of float32 instead of 12 K.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastswa import stretches
from fastswa.flat import FlatBuffers
from fastswa.torch_lerp import Lerp, in_memory_order, quickest
from fastswa.torch_update import TorchUpdate
from fastswa.updates import Random
from fastswa_kernels.rounding import random_bits, round_stochastically

_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class _Piece:
    """A source, or a part of it, or several that are gathered; its counterpart in every set; its elements' numbers."""

    averages: list[Tensor]
    source: Tensor
    numbers: Sequence[tuple[int, int]]


@dataclass(frozen=True)
class _Step:
    """Some pieces of the sources, and their counterparts in every set.

    Args:
        averages: lists of pieces, one list for each set.
        sources: the pieces.
        numbers: of each piece, for each stretch of it, the number of its first element among all elements of all
            sources, and how many elements it has.
        wide_averages: room to compute in, where the averages are narrower than the arithmetic.
        wide_sources: room to convert the sources, likewise.
        operation: that averages them.
        before: gatherings that fill the sources.
    """

    averages: Sequence[list[Tensor]]
    sources: list[Tensor]
    numbers: Sequence[Sequence[tuple[int, int]]]
    wide_averages: list[Tensor] | None
    wide_sources: list[Tensor] | None
    operation: Lerp
    before: Sequence[stretches.Gather] = ()

    def lerp_(self, weights: Sequence[float], random: Random) -> None:
        for gather in self.before:
            gather.run()
        sources = self.sources
        if self.wide_sources is not None:
            torch._foreach_copy_(self.wide_sources, sources)
            sources = self.wide_sources
        for index, (averages, weight) in enumerate(zip(self.averages, weights, strict=True)):
            if weight == 0:
                continue
            results = averages
            if self.wide_averages is not None:
                results = self.wide_averages
                if weight != 1:
                    torch._foreach_copy_(results, averages)
            if weight == 1:
                # Not a lerp: 0 * NaN would keep a NaN that the average held.
                torch._foreach_copy_(results, sources)
            else:
                self.operation(results, sources, weight)
            if self.wide_averages is not None:
                if random is not None and averages[0].dtype in _HALF:
                    results = [
                        _rounded(result.float(), average.dtype, numbers, (*random, index))
                        for result, average, numbers in zip(results, averages, self.numbers, strict=True)
                    ]
                torch._foreach_copy_(averages, results)


class TorchMultiUpdate:
    r"""A prepared update of K sets of averages over fixed tensors.

    .. math:: a_{ki} \leftarrow a_{ki} + w_k (p_i - a_{ki}), \qquad t_j \leftarrow s_j

    Args:
        averages: K sets of floating tensors on one device, all laid out alike; written.
        sources: one for each average of a set, on that device; any floating dtype; read.
        copy_to: tensors of any dtype on that device, to be overwritten.
        copy_from: one for each of `copy_to`; any device and dtype.
        flats: the buffers in which each set's tensors lie.
        flat_copies: the buffers in which `copy_to` lies.
        numbers: of each source's first element, for random bits.
    """

    def __init__(
        self,
        averages: Sequence[Sequence[Tensor]],
        sources: Sequence[Tensor],
        copy_to: Sequence[Tensor],
        copy_from: Sequence[Tensor],
        flats: Sequence[FlatBuffers],
        flat_copies: FlatBuffers | None,
        numbers: Sequence[int],
    ) -> None:
        self._copies = TorchUpdate((), (), copy_to, copy_from, flat_copies)
        self._scratch = stretches.Scratch()
        self._steps: list[_Step] = []
        # The sets are laid out alike, so what is a run in the first is one in all.
        runs, alone = stretches.groups(averages[0], sources, flats[0])
        for run in runs:
            targets = [flat.span(own[run[0]], own[run[-1]]) for flat, own in zip(flats, averages, strict=True)]
            members = [sources[index] for index in run]
            packed = self._scratch.room(members[0].dtype, "packed", targets[0])
            stretch = _stretches([(numbers[index], sources[index].numel()) for index in run])
            self._add([_Piece(targets, packed, stretch)], list(stretches.gathers(members, packed)))
        for together in _together(_pieces(averages, sources, alone, numbers)):
            self._add(together)

    @torch.inference_mode()
    def lerp_(self, weights: Sequence[float] | Tensor, random: Random, skip: Tensor | None) -> None:
        """Run the update.

        Args:
            weights: one for each set, in [0, 1]; a set of weight 0 is left alone. A tensor is read by the host.
            random: seed and step of stochastic rounding of bfloat16 and float16 averages; None to round to nearest.
            skip: not zero makes all of it do nothing; read by the host.
        """
        if skip is not None and bool(skip):
            return
        weights = weights.tolist() if isinstance(weights, Tensor) else weights
        for each in self._steps:
            each.lerp_(weights, random)
        self._copies.lerp_(1.0)

    def _add(self, pieces: Sequence[_Piece], before: Sequence[stretches.Gather] = ()) -> None:
        compute = _compute_dtype(pieces[0])
        targets, sources = [piece.averages[0] for piece in pieces], [piece.source for piece in pieces]
        self._steps.append(
            _Step(
                [list(own) for own in zip(*(piece.averages for piece in pieces), strict=True)],
                sources,
                [piece.numbers for piece in pieces],
                None if targets[0].dtype == compute else self._scratch.rooms(compute, "average", targets),
                None if sources[0].dtype == compute else self._scratch.rooms(compute, "source", targets),
                quickest(targets[0], sources[0], compute),
                before,
            )
        )


def _rounded(
    result: Tensor, dtype: torch.dtype, numbers: Sequence[tuple[int, int]], random: tuple[int, int | Tensor, int]
) -> Tensor:
    bits = [random_bits(first, count, *random, result.device) for first, count in numbers]
    together = bits[0] if len(bits) == 1 else torch.cat(bits)
    # Dense in the order of the average's own memory, like the numbers of the elements.
    return round_stochastically(result, dtype, together.as_strided(result.shape, result.stride()))


def _compute_dtype(piece: _Piece) -> torch.dtype:
    # float32 at least, which two half-precision tensors would not be promoted to.
    return torch.promote_types(torch.promote_types(piece.averages[0].dtype, piece.source.dtype), torch.float32)


def _pieces(
    averages: Sequence[Sequence[Tensor]], sources: Sequence[Tensor], alone: Sequence[int], numbers: Sequence[int]
) -> Iterator[_Piece]:
    """Sources that are no part of a run, cut up where a piece is read more than once."""
    for index in alone:
        first, source, own = numbers[index], sources[index], [tensors[index] for tensors in averages]
        if _read_once(own, source):
            average, source = in_memory_order(own[0], source)
            yield _Piece([average], source, [(first, source.numel())])
            continue
        for together in zip(*(stretches.pieces(average, source) for average in own), strict=True):
            count = together[0][1].numel()
            yield _Piece([average for average, _ in together], together[0][1], [(first, count)])
            first += count


def _together(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    """Pieces that one call takes: alike, and no more than the cache holds where they are read more than once."""
    groups: dict[object, list[_Piece]] = {}
    sizes: Counter[object] = Counter()
    for piece in pieces:
        average, source = piece.averages[0], piece.source
        key = average.dtype, source.dtype, average.dim() == 1, quickest(average, source, _compute_dtype(piece))
        sizes[key] += source.numel()
        if key in groups and sizes[key] > stretches.piece_size(average) and not _read_once(piece.averages, source):
            yield groups.pop(key)
            sizes[key] = source.numel()
        groups.setdefault(key, []).append(piece)
    yield from groups.values()


def _read_once(averages: Sequence[Tensor], source: Tensor) -> bool:
    """Whether one set takes the source as it is, so that it need not stay in the cache."""
    return len(averages) == 1 and averages[0].dtype == source.dtype and source.dtype not in _HALF


def _stretches(numbers: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """First numbers and counts, of which those that follow one another become one."""
    found = [numbers[0]]
    for first, count in numbers[1:]:
        start, size = found[-1]
        if first == start + size:
            found[-1] = (start, size + count)
        else:
            found.append((first, count))
    return found
