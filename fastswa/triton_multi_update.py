"""Several averages of the same tensors on a GPU: one Triton launch for all sets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastswa.updates import Random
from fastswa_kernels import MultiLerpTable
from fastswa_kernels.rounding import StochasticRounding
from fastswa_kernels.table import layout_refusal


class TritonMultiUpdate:
    r"""A prepared update of K sets of averages over fixed tensors.

    .. math:: a_{ki} \leftarrow a_{ki} + w_k (p_i - a_{ki}), \qquad t_j \leftarrow s_j

    Sources that the kernel can't read where they are (other strides, another device) are first copied to where it can.

    Args:
        averages: K sets of floating tensors on one device, all laid out alike; written.
        sources: one for each average of a set; any floating dtype; read.
        copy_to: tensors of any dtype on that device, to be overwritten.
        copy_from: one for each of `copy_to`, of its dtype; any device.
    """

    def __init__(
        self,
        averages: Sequence[Sequence[Tensor]],
        sources: Sequence[Tensor],
        copy_to: Sequence[Tensor],
        copy_from: Sequence[Tensor],
    ) -> None:
        self._staged: list[Tensor] = []
        self._origins: list[Tensor] = []
        self._table = MultiLerpTable(
            averages,
            [self._readable(average, source) for average, source in zip(averages[0], sources, strict=True)],
            copy_to,
            [self._readable(target, source) for target, source in zip(copy_to, copy_from, strict=True)],
        )

    def _readable(self, target: Tensor, source: Tensor) -> Tensor:
        if layout_refusal(target, source) is None:
            return source
        self._staged.append(torch.empty_like(target, dtype=source.dtype))
        self._origins.append(source)
        return self._staged[-1]

    def lerp_(self, weights: Sequence[float] | Tensor, random: Random, skip: Tensor | None) -> None:
        """Launch the update.

        Args:
            weights: one for each set, in [0, 1], or a tensor of them on the device, which is not read by the host.
            random: seed and step of stochastic rounding of bfloat16 and float16 averages; None to round to nearest.
            skip: on the device; not zero makes all of it do nothing.
        """
        if self._staged:
            torch._foreach_copy_(self._staged, self._origins)
        self._table.lerp_(weights, rounding=None if random is None else StochasticRounding(*random), skip=skip)
