"""Running means and variances of weights, and their deviations from the mean, in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from .arguments import check_weight
from .moments_arguments import check_moments, check_slot, named_slots
from .moments_kernel import moments_kernel
from .moments_table import MomentsRows, prepare
from .pairs import dense_like
from .table import LaunchConfig, layout_refusal


class MomentsTable:
    r"""A prepared `moments_` over fixed tensors, with a ring of deviations, to be launched again and again.

    .. math::
        d = p - \mu, \qquad \mu \leftarrow \mu + w d, \qquad
        \sigma^2 \leftarrow (1 - w)(\sigma^2 + w d^2), \qquad \delta_k \leftarrow (1 - w)\, d

    One launch for each device and pair of dtypes. The table holds addresses: keep the tensors alive, and make a new
    table when one of them gets new memory.

    Args:
        means: CUDA tensors of float32, bfloat16, float16 or float64, dense in memory; written.
        variances: one for each mean, of its shape, strides, dtype and device; not negative; written.
        sources: one for each mean, of its shape, strides and device; any of those dtypes; read.
        deviations: the slots of a ring, lists like the variances; a call writes one of them or none.
        config: the launches' shape; chosen from the number of elements where left out.

    Raises:
        ValueError: names the first tensor that can't take part, with the reason.
        TypeError: names the first tensor of another dtype.

    Example:
        >>> weights = [torch.ones(1000, device="cuda")]
        >>> means, variances = [torch.empty(1000, device="cuda")], [torch.empty(1000, device="cuda")]
        >>> ring = [[torch.empty(1000, device="cuda")] for _ in range(20)]
        >>> table = MomentsTable(means, variances, weights, ring)
        >>> for n in range(1, 4):
        ...     table.moments_(1 / n, slot=(n - 1) % 20)  # after each epoch
        >>> means[0][0].item(), variances[0][0].item(), ring[2][0][0].item()
        (1.0, 0.0, 0.0)
    """

    def __init__(
        self,
        means: Sequence[Tensor],
        variances: Sequence[Tensor],
        sources: Sequence[Tensor],
        deviations: Sequence[Sequence[Tensor]] = (),
        config: LaunchConfig | None = None,
    ) -> None:
        indices = check_moments(means, variances, sources, named_slots(deviations))
        self._slots = len(deviations)
        self._launches = prepare(sources, means, variances, deviations, indices, "SOURCE", config)

    @property
    def launches(self) -> int:
        """How many kernels one call of `moments_` launches."""
        return len(self._launches)

    def moments_(self, weight: float | Tensor, slot: int | None = None) -> None:
        """Launch the update.

        Args:
            weight: in [0, 1]: a float, or a 0-dimensional floating tensor on the means' device, read there by the
                kernel.
            slot: of the ring, to be overwritten; None writes none.

        Raises:
            ValueError: a weight outside [0, 1], no such slot.
            TypeError: numbers of other types. Nothing has been written in any of these cases.
        """
        check_weight(weight)
        check_slot(slot, self._slots)
        _launch(self._launches, weight, slot)


@torch.no_grad()
def moments_(
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    sources: Sequence[Tensor],
    weight: float | Tensor,
    deviations: Sequence[Tensor] | None = None,
) -> None:
    r"""Take one more model into running means and variances, in place, and note how far it is from the new mean.

    .. math::
        d = p - \mu, \qquad \mu \leftarrow \mu + w d, \qquad
        \sigma^2 \leftarrow (1 - w)(\sigma^2 + w d^2), \qquad \delta \leftarrow (1 - w)\, d

    `fastswa_kernels.reference.moments_` is the specification. Each call checks the lists and makes a table; where
    models are taken often, keep a `MomentsTable`.

    Args:
        means: CUDA tensors of float32, bfloat16, float16 or float64; any shape and offset; written. One with gaps
            between its elements is updated through a dense copy.
        variances: one for each mean, of its shape, dtype and device; not negative; written. Where it has other strides
            than its mean, it is updated through a copy.
        sources: one for each mean, of its shape; any of those dtypes. A source with other strides or on another device
            is first copied into the mean's layout.
        weight: in [0, 1]: a float, or a 0-dimensional floating tensor on the means' device, read there.
        deviations: one for each mean, like the variances; overwritten. None where they are not wanted.

    Raises:
        ValueError: lists of different length, shapes, dtypes or devices that differ, memory that overlaps, a weight
            outside [0, 1]; nothing has been written.
        TypeError: a dtype that is not one of the four; nothing has been written.

    Example:
        >>> mean, variance = [torch.empty(1000, device="cuda")], [torch.empty(1000, device="cuda")]
        >>> for n, weight in enumerate((1.0, 5.0), 1):
        ...     moments_(mean, variance, [torch.full((1000,), weight, device="cuda")], 1 / n)
        >>> mean[0][0].item(), variance[0][0].item()
        (3.0, 4.0)

    References:
        West 1979, Updating Mean and Variance Estimates: An Improved Method.
        Maddox et al. 2019, A Simple Baseline for Bayesian Uncertainty in Deep Learning, Algorithm 1.
    """
    check_weight(weight)
    given = [means, variances, *([] if deviations is None else [deviations])]
    named = [] if deviations is None else [("deviations", deviations)]
    indices = check_moments(means, variances, sources, named)
    written, read, back = [list(tensors) for tensors in given], list(sources), []
    for index in indices:
        for tensors in (*written, read):
            tensor = tensors[index]
            if layout_refusal(means[index], tensor):
                tensors[index] = dense_like(means[index], tensor.dtype).copy_(tensor)
                if tensors is not read:
                    back.append((tensor, tensors[index]))
    launches = prepare(read, written[0], written[1], written[2:], indices, "SOURCE")
    _launch(launches, weight, None if deviations is None else 0)
    for tensor, copy in back:
        tensor.copy_(copy)


def _launch(launches: Sequence[MomentsRows], weight: float | Tensor, slot: int | None) -> None:
    for launch in launches:
        device = launch.table.device
        value: float | Tensor
        if isinstance(weight, Tensor):
            value = weight.to(device)
        elif launch.compute == torch.float64:
            # Triton passes a float as float32. Filled, not copied from the host: a copy would wait for the device.
            value = torch.full((), float(weight), dtype=torch.float64, device=device)
        else:
            value = float(weight)
        compute = tl.float64 if launch.compute == torch.float64 else tl.float32
        launch.launch(moments_kernel, slot, value, WEIGHT_IS_TENSOR=isinstance(value, Tensor), COMPUTE=compute)
