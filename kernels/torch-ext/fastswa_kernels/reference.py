"""The specification: what every kernel computes, in plain torch, with the same signatures.

Run on float64 copies, these are the numbers that the kernels are tested against. They allocate temporaries and loop
over tensors in Python; they are for reading and for checking, not for speed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .pairs import check_lerp, check_weight, distinct


@torch.no_grad()
def lerp_(averages: Sequence[Tensor], sources: Sequence[Tensor], weight: float | Tensor) -> None:
    r"""Move each average towards its source, in place.

    .. math:: a \leftarrow a + w (p - a)

    The two-sided form is used (from ``a`` where ``|w| < 1/2``, from ``p`` elsewhere), so that a small ``w`` loses
    nothing of ``a`` and ``w = 1`` gives ``p`` exactly, also where ``a`` was NaN. Arithmetic is float32, or float64
    where either tensor is, with one rounding at the store.

    Args:
        averages: tensors of float32, bfloat16, float16 or float64; any shape and strides; written.
        sources: one for each average, of the same shape; any of those dtypes; read.
        weight: in [0, 1]: a float, or a 0-dimensional floating tensor.

    Raises:
        ValueError: lists of different length, shapes that differ, memory that overlaps, a weight outside [0, 1];
            nothing has been written.
        TypeError: a dtype that is not one of the four; nothing has been written.

    Example:
        >>> average = [torch.tensor([0.0, 4.0])]
        >>> lerp_(average, [torch.tensor([1.0, 8.0])], 0.25)
        >>> average
        [tensor([0.2500, 5.0000])]

    References:
        Izmailov et al. 2018, Averaging Weights Leads to Wider Optima and Better Generalization, Algorithm 1.
    """
    check_weight(weight)
    check_lerp(averages, sources)
    for index in distinct(averages, sources):
        average, source = averages[index], sources[index]
        compute = torch.float64 if torch.float64 in (average.dtype, source.dtype) else torch.float32
        old = average.to(compute)
        new = source.to(average.device, compute)
        w = torch.as_tensor(weight, device=average.device, dtype=compute)
        blended = torch.where(w.abs() < 0.5, old + w * (new - old), new - (new - old) * (1 - w))
        average.copy_(torch.where(w == 1, new, blended))
