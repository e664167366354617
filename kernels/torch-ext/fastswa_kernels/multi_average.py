"""Several averages of the same weights, moved in one launch that reads the weights once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .arguments import check_update
from .average_plan import plan, update
from .rounding import StochasticRounding
from .table import LaunchConfig


class MultiLerpTable:
    r"""A prepared `multi_lerp_` over fixed tensors, to be launched again and again.

    .. math:: a_{ki} \leftarrow a_{ki} + w_k (p_i - a_{ki}), \qquad t_j \leftarrow s_j

    One launch for each device and pair of dtypes, and for each 8 averages of a source; the copies travel in the first
    launch of their device. The table holds addresses: keep the tensors alive, and make a new table when one of them
    gets new memory.

    Args:
        averages: K lists of CUDA tensors of float32, bfloat16, float16 or float64, dense in memory; written. The K
            averages of one source have one dtype.
        sources: one for each average of a list, of its shape, strides and device; any of those dtypes; read.
        copy_to: tensors of any dtype (integer buffers), dense in memory, to be overwritten.
        copy_from: one for each of `copy_to`, of its shape, strides, dtype and device.
        config: the launches' shape; chosen from the number of elements where left out.
        first_elements: for each source the number of its first element, by which stochastic rounding takes its random
            bits: of parts of a tensor, their places in it. Where the source before it ends, if left out.

    Raises:
        ValueError: names the first tensor that can't take part, with the reason.
        TypeError: names the first average or source of another dtype.

    Example:
        >>> weights = [torch.ones(1000, device="cuda")]
        >>> slow, fast = [torch.zeros(1000, device="cuda")], [torch.zeros(1000, device="cuda")]
        >>> table = MultiLerpTable([slow, fast], weights)
        >>> table.lerp_([0.001, 0.25])  # after each optimizer.step()
        >>> fast[0][0].item()
        0.25
    """

    def __init__(
        self,
        averages: Sequence[Sequence[Tensor]],
        sources: Sequence[Tensor],
        copy_to: Sequence[Tensor] = (),
        copy_from: Sequence[Tensor] = (),
        config: LaunchConfig | None = None,
        first_elements: Sequence[int] | None = None,
    ) -> None:
        self._averages = len(averages)
        self._launches = plan(averages, sources, copy_to, copy_from, config, first_elements=first_elements)

    @property
    def launches(self) -> int:
        """How many kernels one call of `lerp_` launches."""
        return len(self._launches)

    def lerp_(
        self,
        weights: Sequence[float] | Tensor,
        rounding: StochasticRounding | None = None,
        skip: Tensor | None = None,
    ) -> None:
        """Launch the update.

        Args:
            weights: K floats in [0, 1], or a floating tensor of shape (K,) on the averages' device, read there by the
                kernel (so that a captured CUDA graph follows it). An average of weight 0 is neither read nor written.
            rounding: of bfloat16 and float16 averages; None rounds to the nearest.
            skip: a tensor of one element on the averages' device, read there: where it isn't 0, nothing is written,
                neither averages nor copies.

        Raises:
            ValueError: weights of another number or outside [0, 1], a flag of more than one element.
            TypeError: arguments of other types. Nothing has been written in any of these cases.
        """
        check_update(weights, self._averages, rounding, skip)
        for launch in self._launches:
            launch.run(weights, rounding, skip)


@torch.no_grad()
def multi_lerp_(
    averages: Sequence[Sequence[Tensor]],
    sources: Sequence[Tensor],
    weights: Sequence[float] | Tensor,
    *,
    rounding: StochasticRounding | None = None,
    skip: Tensor | None = None,
) -> None:
    r"""Move K averages of each source towards it, in place, reading the source once for each 8 of them.

    .. math:: a_{ki} \leftarrow a_{ki} + w_k (p_i - a_{ki})

    `fastswa_kernels.reference.multi_lerp_` is the specification. The tables of the last few lists are kept by address,
    so a training loop that calls this each step builds them once; a `MultiLerpTable` that the caller keeps is quicker
    still.

    Args:
        averages: K lists of CUDA tensors of float32, bfloat16, float16 or float64; any shape and offset; written.
            averages[k][i] follows sources[i]; the K averages of one source have one dtype and device. Where one has
            gaps between its elements, or other strides than averages[0][i], it is updated through a dense copy.
        sources: one for each average of a list, of the same shape; any of those dtypes. A source with other strides or
            on another device is first copied into the averages' layout.
        weights: K floats in [0, 1], or a floating tensor of shape (K,) on the averages' device, read there. An average
            of weight 0 is neither read nor written.
        rounding: of bfloat16 and float16 averages, by random bits of each element's number in the list of sources;
            None rounds to the nearest.
        skip: a tensor of one element on the averages' device, read there: where it isn't 0, nothing is written.

    Raises:
        ValueError: lists of different length, shapes or dtypes that differ, memory that overlaps, weights of another
            number or outside [0, 1], a flag of more than one element.
        TypeError: a dtype that is not one of the four, arguments of other types. Nothing has been written in any of
            these cases.

    Example:
        >>> slow, fast = [torch.zeros(1000, device="cuda")], [torch.zeros(1000, device="cuda")]
        >>> multi_lerp_([slow, fast], [torch.ones(1000, device="cuda")], [0.001, 0.25])
        >>> fast[0][0].item()
        0.25
    """
    check_update(weights, len(averages), rounding, skip)
    update(averages, sources, weights, rounding, skip)
