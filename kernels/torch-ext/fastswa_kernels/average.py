"""The update of averages, prepared once and launched each step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .arguments import check_weight
from .average_plan import plan, update
from .table import LaunchConfig


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
        self._launches = plan([averages], sources, copy_to, copy_from, config, single=True)

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
            launch.run(_as_weights(weight))


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
    update([averages], sources, _as_weights(weight), single=True)


def _as_weights(weight: float | Tensor) -> tuple[float] | Tensor:
    return weight.reshape(1) if isinstance(weight, Tensor) else (weight,)
