"""Several averages of the same tensors on a GPU: one Triton launch for all sets."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastswa.updates import Random
from fastswa_kernels import MultiLerpTable
from fastswa_kernels.rounding import StochasticRounding


class TritonMultiUpdate:
    r"""A prepared update of K sets of averages over fixed tensors.

    .. math:: a_{ki} \leftarrow a_{ki} + w_k (p_i - a_{ki}), \qquad t_j \leftarrow s_j

    Args:
        averages: K sets of floating tensors on one device, all laid out alike; written.
        sources: one for each average of a set, of its layout and device; any floating dtype; read.
        copy_to: tensors of any dtype on that device, to be overwritten.
        copy_from: one for each of `copy_to`, of its dtype, layout and device.
        numbers: of each source's first element, for random bits.
    """

    def __init__(
        self,
        averages: Sequence[Sequence[Tensor]],
        sources: Sequence[Tensor],
        copy_to: Sequence[Tensor],
        copy_from: Sequence[Tensor],
        numbers: Sequence[int],
    ) -> None:
        self._table = MultiLerpTable(averages, sources, copy_to, copy_from, first_elements=numbers)

    def lerp_(self, weights: Sequence[float] | Tensor, random: Random, skip: Tensor | None) -> None:
        """Launch the update.

        Args:
            weights: one for each set, in [0, 1], or a tensor of them on the device, which is not read by the host.
            random: seed and step of stochastic rounding of bfloat16 and float16 averages; None to round to nearest.
            skip: on the device; not zero makes all of it do nothing.
        """
        self._table.lerp_(weights, rounding=None if random is None else StochasticRounding(*random), skip=skip)
