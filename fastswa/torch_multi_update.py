"""Several averages of the same tensors in plain torch: each stretch of the sources is brought into the cache once.

The averages of one set after another would read every source K times from memory. Here a piece that fits the cache is
averaged into all K sets before the next is read: 8 K + 4 bytes an element of float32 instead of 12 K.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastswa import stretches
from fastswa.flat import FlatBuffers
from fastswa.torch_lerp import Lerp, quickest
from fastswa.torch_update import TorchUpdate
from fastswa.updates import Random
from fastswa_kernels.rounding import random_bits, round_stochastically

_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class _Step:
    """A piece of the sources, and its counterpart in every set.

    Args:
        averages: one for each set.
        source: the piece.
        numbers: for each stretch of it the number of its first element among all elements of all sources, and how many
            elements it has.
        wide_average: room to compute in, where the averages are narrower than the arithmetic.
        wide_source: room to convert the source, likewise.
        operation: that averages them.
        before: gatherings that fill the source.
    """

    averages: Sequence[Tensor]
    source: Tensor
    numbers: Sequence[tuple[int, int]]
    wide_average: Tensor | None
    wide_source: Tensor | None
    operation: Lerp
    before: Sequence[stretches.Gather] = ()

    def lerp_(self, weights: Sequence[float], random: Random) -> None:
        for gather in self.before:
            gather.run()
        source = self.source if self.wide_source is None else self.wide_source.copy_(self.source)
        for index, (average, weight) in enumerate(zip(self.averages, weights, strict=True)):
            if weight == 0:
                continue
            if self.wide_average is None:
                # Not lerp_ for 1: 0 * NaN would keep a NaN that the average held.
                average.copy_(source) if weight == 1 else self.operation([average], [source], weight)
                continue
            result = self.wide_average.copy_(source if weight == 1 else average)
            if weight != 1:
                self.operation([result], [source], weight)
            if random is not None and average.dtype in _HALF:
                result = result.float()
                bits = self._bits(*random, index)
                # Dense in the order of the average's own memory, like the numbers of the elements.
                result = round_stochastically(result, average.dtype, bits.as_strided(result.shape, result.stride()))
            average.copy_(result)

    def _bits(self, seed: int, step: int | Tensor, average: int) -> Tensor:
        device = self.source.device
        bits = [random_bits(first, count, seed, step, average, device) for first, count in self.numbers]
        return bits[0] if len(bits) == 1 else torch.cat(bits)


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
            parts = _stretches([(numbers[index], sources[index].numel()) for index in run])
            self._add(targets, packed, parts, list(stretches.gathers(members, packed)))
        for index in alone:
            first, source = numbers[index], sources[index]
            if len(averages) == 1 and averages[0][index].dtype == source.dtype and source.dtype not in _HALF:
                # One set reads each source once anyhow, and converts nothing.
                self._add([averages[0][index]], source, [(first, source.numel())])
                continue
            pieces = [stretches.pieces(own[index], source) for own in averages]
            for together in zip(*pieces, strict=True):
                count = together[0][1].numel()
                self._add([average for average, _ in together], together[0][1], [(first, count)])
                first += count

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

    def _add(
        self,
        averages: Sequence[Tensor],
        source: Tensor,
        numbers: Sequence[tuple[int, int]],
        before: Sequence[stretches.Gather] = (),
    ) -> None:
        # float32 at least, which two half-precision tensors would not be promoted to.
        compute = torch.promote_types(torch.promote_types(averages[0].dtype, source.dtype), torch.float32)
        wide_average = None if averages[0].dtype == compute else self._scratch.room(compute, "average", averages[0])
        wide_source = None if source.dtype == compute else self._scratch.room(compute, "source", averages[0])
        operation = quickest(
            averages[0] if wide_average is None else wide_average, source if wide_source is None else wide_source
        )
        self._steps.append(_Step(averages, source, numbers, wide_average, wide_source, operation, before))


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
