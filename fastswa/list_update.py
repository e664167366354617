"""Tensors kept as averages of other tensors: flat buffers and launch, prepared once and checked each step."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from fastswa.flat import FlatBuffers
from fastswa.module_update import Lerp, divide, prepare_lerp, tensor_refusal
from fastswa.pairing import Pair, check_shapes
from fastswa.updates import Random


class ListUpdate:
    """The prepared update of a list of averages from a list of tensors, paired by order.

    The averages are moved into flat buffers and keep their identity. Integers are copied.

    Args:
        averages: tensors of any dtype, each listed once; written.
        sources: one for each average; read, and not kept alive. A tensor may be there twice.
        backend: as `backends.choose` takes it.
        copied: positions of tensors that are copied though they are floating.
        stochastic: prepare for stochastic rounding of bfloat16 and float16 averages.

    Raises:
        ValueError: lists of different lengths, or tensors of different shapes; names the first by its position.
        TypeError: a tensor that can't be averaged; names it likewise.
        RuntimeError: backend "triton" can't run; says why.

    Example:
        >>> average, weight = torch.zeros(3), torch.ones(3)
        >>> update = ListUpdate([average], [weight])
        >>> update.lerp_(0.25)
        >>> average
        tensor([0.2500, 0.2500, 0.2500])
    """

    def __init__(
        self,
        averages: Sequence[Tensor],
        sources: Sequence[Tensor],
        backend: str = "auto",
        copied: Iterable[int] = (),
        stochastic: bool = False,
    ) -> None:
        if len(averages) != len(sources):
            raise ValueError(f"there are {len(averages)} averages, but {len(sources)} tensors to update them from")
        pairs = [Pair(str(i), *pair) for i, pair in enumerate(zip(averages, sources, strict=True))]
        for pair in check_shapes("tensor", pairs):
            reason = tensor_refusal(pair.average) or tensor_refusal(pair.source)
            if reason is not None:
                raise TypeError(f"tensor {pair.name!r} is {reason}, and can't be averaged")
        lerps, copies = divide(pairs, set(map(str, copied)))
        flat = FlatBuffers([pair.average for pair in (*lerps, *copies)])
        # What is prepared serves later calls too, which may be outside inference mode. It gets aliases of the sources,
        # so that these may end.
        with torch.inference_mode(False), torch.no_grad():
            self._update: Lerp | None = prepare_lerp(
                [_real(pair.average) for pair in lerps],
                [_real(pair.source) for pair in lerps],
                [pair.average for pair in copies],
                [pair.source.detach() for pair in copies],
                backend,
                flat,
                stochastic,
            )
        self._known = list(map(id, sources))
        self._addresses = _addresses(averages), _addresses(sources)
        forget = partial(_forget, weakref.ref(self))
        self._references = [weakref.ref(source, forget) for source in sources]

    def fits(self, averages: Sequence[Tensor], sources: Sequence[Tensor]) -> bool:
        """Whether the update is still right for these lists, in their present memory.

        Args:
            averages: that are to be written.
            sources: that are to be read.
        """
        # An id stands for its tensor only while that lives; its end ends the prepared update.
        return (
            self._update is not None
            and list(map(id, sources)) == self._known
            and (_addresses(averages), _addresses(sources)) == self._addresses
        )

    @torch.no_grad()
    def lerp_(self, weight: float | Tensor, random: Random = None) -> None:
        """Move the averages towards their sources by `weight`, and copy what is copied.

        Args:
            weight: in [0, 1]: a float, or a 0-dimensional tensor on the averages' device.
            random: seed and step of stochastic rounding, if it was prepared for; None to round to nearest.
        """
        assert self._update is not None  # the caller asked fits()
        self._update(weight, random)


def _forget(update: weakref.ref[ListUpdate], _: object) -> None:
    alive = update()
    if alive is not None:
        alive._update = None


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
